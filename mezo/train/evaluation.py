"""A saved run on examples: the base model beside the adapter."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezo._inputs import require
from mezo.checkpoint.records import write_json
from mezo.checkpoint.run_directory import read_summary
from mezo.data.example import Example
from mezo.run import Run
from mezo.train.encoded import batches_of
from mezo.train.evaluate import evaluate
from mezo.train.examples import load_examples, load_test
from mezo.train.metrics import METRICS, check_answers, metrics_of
from mezo.train.model_card import IN_MEMORY
from mezo.train.saved_run import open_run, settings_in

_GENERATED = 50  # prompts that are generated for at once


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores of the base model and of the adapter on the same examples.

    Args:
        num_examples: how many.
        base: {name: value} of the base model: loss (nats), accuracy, perplexity and others.
        adapter: the same of the adapter.
    """

    num_examples: int
    base: dict[str, float]
    adapter: dict[str, float]


def evaluate_run(
    run_dir: str | Path,
    data: Any = None,
    *,
    split: str | None = None,
    metric: str | None = None,
    max_examples: int | None = None,
    max_new_tokens: int | None = None,
    engine: str | None = None,
    model: str | None = None,
    threads: int | None = None,
) -> Comparison:
    """Score a saved adapter and its base model, and write eval_results.json beside it.

    Args:
        run_dir: the output directory of a training.
        data: as in `mezo.finetune`, worded as the training's; None: the training's own held-out
            examples.
        split: of the data; None: the training's test split.
        metric: a name in `mezo.train.metrics.METRICS`; None: the training's. Metrics of texts
            generate the completions, greedily.
        max_examples: the most examples, taken at random and always the same; None: all of them.
        max_new_tokens: of a generated completion; None: twice the longest right answer.
        engine: see `mezo.train.saved_run.open_run`, like the next two.
        model: see there.
        threads: see there.

    Raises:
        ValueError: no run there, bad data, or a metric that does not suit it.
        EngineError: the engine cannot start.
    """
    require(
        split is None or data is not None,
        f"eval: split must be one of data, got {split!r} and no data; pass data, or leave it out "
        "for the training's held-out examples.",
    )
    summary = read_summary(run_dir)
    settings = settings_in(run_dir)
    with open_run(run_dir, engine=engine, model=model, threads=threads) as run:
        config, tokenizer = run.config, run.session.tokenizer
        if data is None:
            require(
                settings.task is not None or settings.data not in (None, IN_MEMORY),
                "eval: data must be given, got none, and the training's was in memory; pass data.",
            )
            require(
                settings.eval_data != IN_MEMORY,
                "eval: data must be given, got none, and the training's eval_data was in memory; "
                "pass data.",
            )
            examples = load_examples(settings, config, tokenizer).test
        else:
            names = tuple(summary.get("label_names") or ())
            examples = load_test(settings, config, tokenizer, data, split=split, label_names=names)
        examples = _few(examples, max_examples)
        require(bool(examples), "eval: there must be an example, got none; pass other data.")
        chosen = metric or summary.get("metric")
        size = settings.eval_batch_size
        found = {
            is_base: _scores(run, examples, chosen, size, max_new_tokens, is_base=is_base)
            for is_base in (True, False)
        }
    result = Comparison(len(examples), found[True], found[False])
    write_json(Path(run_dir) / "eval_results.json", result)
    return result


def _few(examples: list[Example], count: int | None) -> list[Example]:
    """At most ``count`` examples, always the same ones: of sorted data not one label only."""
    if count is None or count >= len(examples):
        return examples
    if any(example.group for example in examples):
        return examples[:count]  # questions stay whole
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), count))]


def _scores(
    run: Run,
    examples: Sequence[Example],
    metric: str | None,
    size: int,
    max_new_tokens: int | None,
    *,
    is_base: bool,
) -> dict[str, float]:
    """All figures of one set of weights."""
    is_of_text = metric is not None and METRICS[METRICS.check(metric, "eval: ")].is_of_text
    if is_of_text:
        check_answers(str(metric), examples)
    whole = evaluate(run, batches_of(run, examples, size), base=is_base)
    found = {"loss": whole.loss}
    if whole.accuracy is not None:
        found["accuracy"] = whole.accuracy
    compute = metrics_of(None if is_of_text else metric, examples)
    if compute is not None:
        found |= compute(whole)
    if is_of_text:
        assert metric is not None
        length = max_new_tokens or 2 * max(_tokens_of(run, e) for e in examples)
        texts: list[str] = []
        for i in range(0, len(examples), _GENERATED):
            prompts = [example.prompt for example in examples[i : i + _GENERATED]]
            texts += run.generate(prompts, max_new_tokens=length, base=is_base)
        found |= METRICS[metric].compute([text.strip() for text in texts], examples)
    return found


def _tokens_of(run: Run, example: Example) -> int:
    """Tokens of the longest right answer."""
    tokenizer = run.session.tokenizer
    return max(
        (len(tokenizer(answer)["input_ids"]) for answer in example.answers),
        default=len(tokenizer(str(example.completion))["input_ids"]),
    )


def table_of(result: Comparison) -> str:
    """Return a comparison as a table."""
    width = max(map(len, result.adapter))
    lines = [f"{'':{width}}  {'base':>10}  {'adapter':>10}"]
    for name, value in result.adapter.items():
        lines.append(f"{name:{width}}  {result.base[name]:10.4f}  {value:10.4f}")
    return "\n".join([*lines, f"({result.num_examples} examples)"])
