"""Fine-tune a model on rows of your own, in one call.

    python examples/finetune.py path/to/model runs/mine [sglang|transformers]

The adapter in runs/mine/adapter is an ordinary PEFT adapter: PEFT, SGLang and vLLM load it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mezo

DATA = Path(__file__).with_name("own_data.csv")  # columns text and label


def main(model: str, output: str, engine: str = "sglang") -> None:
    """Train on the file, with the last rows held out, and say what came of it."""
    summary = mezo.finetune(
        model,
        DATA,
        output_dir=output,
        engine=engine,
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        eps=1e-3,
        callbacks=[lambda p: p.result and print(f"step {p.step}: loss {p.result.loss:.4f}")],
    )
    losses = [f"{scores.loss:.4f}" for scores in (summary.before, summary.after) if scores]
    print(f"loss {' -> '.join(losses)}, {summary.problems}")


if __name__ == "__main__":  # the engine starts processes
    main(*sys.argv[1:4])
