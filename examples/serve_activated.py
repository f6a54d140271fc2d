"""Serve an adapter from disk in SGLang, ordinary or activated, beside its base model.

python examples/serve_activated.py path/to/model adapter/ "2 + 2 = Answer :"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mezo


def main(model_path: str, adapter: str, prompt: str) -> None:
    """Generate with the base model and with the adapter."""
    fields = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    engine = mezo.launch_engine(
        model_path,
        max_lora_rank=fields["r"],
        lora_target_modules=fields["target_modules"],
        disable_overlap_schedule=True,  # activated adapters need it off
    )
    try:
        loaded = engine.load_lora_adapter("mine", adapter)
        assert loaded.success, loaded.error_message  # it does not raise
        for name in (None, "mine"):
            output = engine.generate(prompt, {"max_new_tokens": 8}, lora_path=name)
            print(f"{name or 'base model'}: {output['text']!r}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine starts processes
    main(*sys.argv[1:4])
