"""Train an adapter on batches of your own, on a plain Hugging Face model.

    python examples/train.py path/to/model adapter/

The adapter is an ordinary PEFT adapter: PEFT, SGLang and vLLM load it.
"""

from __future__ import annotations

import sys

# isort: off
import mezo  # before transformers on hosts without a GPU
from transformers import AutoModelForCausalLM, AutoTokenizer

# isort: on

REVIEWS = [
    ("a fine film with a warm heart", 1),
    ("two hours that I want back", 0),
    ("the cast is a delight", 1),
    ("dull from start to end", 0),
]


def main(model_path: str, output: str, num_steps: int = 20) -> None:
    """Take steps on one batch of labelled reviews and save the adapter."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    batch = mezo.Batch(
        prompts=[f"{text} . It was" for text, _ in REVIEWS],
        options=[" bad", " good"],
        labels=[label for _, label in REVIEWS],
    )
    config = mezo.MeZOConfig(rank=8, target_modules=("q_proj", "v_proj"), lr=3e-3, eps=1e-3)
    with mezo.attach(model, config, tokenizer=tokenizer) as run:
        before = run.evaluate(batch)
        for _ in range(num_steps):
            result = mezo.step(run, batch)
            print(f"step {result.step}: loss {result.loss:.4f}")
        after = run.evaluate(batch)
        print(f"loss {before.loss:.4f} -> {after.loss:.4f}, accuracy {after.accuracy:.2f}")
        run.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:3])
