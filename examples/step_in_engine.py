"""Train an activated adapter inside SGLang, and serve it from the same engine.

    python examples/step_in_engine.py path/to/model adapter/

Prompts run on the base model once and stay in SGLang's cache; a step computes only what follows.
"""

from __future__ import annotations

import itertools
import sys

import mezo

QUESTIONS = [("2 + 2 =", " 4"), ("3 + 5 =", " 8"), ("7 + 1 =", " 8"), ("6 + 3 =", " 9")]


def show(progress) -> None:
    """Print a step or an evaluation."""
    if progress.evaluation is not None:
        print(f"step {progress.step}: held-out loss {progress.evaluation.loss:.4f}")
    elif progress.result is not None:
        print(f"step {progress.step}: loss {progress.result.loss:.4f}")


def main(model_path: str, output: str, num_steps: int = 20) -> None:
    """Train, ask the trained adapter a question, and save it."""
    config = mezo.MeZOConfig(
        rank=8,
        target_modules=("q_proj", "v_proj"),
        lr=1e-3,
        eps=1e-3,
        prefix="activated",
        invocation=" Answer :",  # the adapter acts from here on
        name="sums",
    )
    batch = mezo.Batch(
        prompts=[question for question, _ in QUESTIONS],
        completions=[answer for _, answer in QUESTIONS],
    )
    # Or your own sglang.Engine. Serving an activated adapter needs the overlap scheduler off.
    engine = mezo.launch_engine(model_path, config, disable_overlap_schedule=True)
    try:
        with mezo.attach(engine, config) as run:
            trainer = mezo.MeZOTrainer(
                run,
                itertools.repeat(batch),
                num_steps=num_steps,
                schedule="linear",
                held_out=[batch],
                callbacks=[show],
            )
            summary = trainer.train()
            print(f"{summary.steps} steps, problems: {list(summary.problems)}")
            prompt = f"{QUESTIONS[0][0]}{config.invocation}"
            answer = engine.generate(prompt, {"max_new_tokens": 4}, lora_path=run.name)
            print(f"{prompt!r} -> {answer['text']!r}")
            run.save(output)
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine starts processes
    main(*sys.argv[1:3])
