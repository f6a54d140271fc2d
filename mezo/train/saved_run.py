"""`open_run`: a finished training's adapter in an engine again, to evaluate and to generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mezo._closing import closing
from mezo._inputs import require
from mezo.checkpoint.peft import read_peft
from mezo.checkpoint.run_directory import adapter_directory, base_model_of, read_summary
from mezo.config import MeZOConfig, TrainConfig
from mezo.data.batch import Batch
from mezo.data.chats import Chats
from mezo.data.checks import Text
from mezo.engines import ENGINES
from mezo.run import Run, attach
from mezo.settings import read_yaml, settings_of
from mezo.train.base_model import launch_options, load_tokenizer


@contextmanager
def open_run(
    run_dir: str | Path,
    *,
    engine: str | None = None,
    model: str | Path | None = None,
    threads: int | None = None,
) -> Iterator[Run]:
    """Start an engine with a run's base model and put the run's saved adapter into it.

    Args:
        run_dir: the output directory of a training: adapter/, summary.json and, if it is there,
            run.yaml, which says in what revision and dtype the model was loaded.
        engine: name of the engine; None: the one it was trained in.
        model: directory or hub name of the base model; None: the one it was trained on.
        threads: CPU hosts: threads of the engine; None: see `mezo.launch_engine`.

    Returns:
        A context manager that gives a `Run` with the training's settings and the saved fp32
        weights: in the same engine, `Run.evaluate` gives the bits that it gave after the last step.
        Its `steps` are 0. The engine ends with the context.

    Raises:
        ValueError: no run there, or one whose files do not fit together; an unknown engine; no
            base model.
        ImportError: the engine is not installed.
        EngineError: it cannot start.
    """
    summary = read_summary(run_dir)
    fields, weights = read_peft(adapter_directory(run_dir))
    config, settings = _config_of(summary["config"], run_dir), settings_in(run_dir)
    if model is not None:
        settings = dataclasses.replace(settings, model_revision=None)
    name = ENGINES.check(engine or summary.get("engine"), "run: ")
    base = base_model_of(fields, model)
    tokenizer, options = load_tokenizer(base, settings), launch_options(settings)
    with ENGINES[name].launch(base, config, threads=threads, **options) as handle:
        run = attach(handle, config, tokenizer=tokenizer)
        with closing(run.close):
            # `save_peft` adds zeros for these.
            added = {n for n in run.session.partners if n in weights and not weights[n].any()}
            run.set_weights({n: value for n, value in weights.items() if n not in added})
            yield run


def worded(run_dir: str | Path, run: Run, prompts: Sequence[str]) -> list[Text]:
    """Put texts to a run as its training's rows were worded: as they are, or as a chat's messages.

    Args:
        run_dir: the output directory of its training.
        run: from `open_run`.
        prompts: what the user asks.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    asks = read_summary(run_dir).get("asks", "text")
    if asks != "chat":
        return [f"{prompt.strip()}\n" if asks == "line" else prompt for prompt in prompts]
    template = settings_in(run_dir).chat_template_path
    chats, header = Chats(run.session.tokenizer, template), run.invocation.tokens
    found: list[Text] = []
    for prompt in prompts:
        ids = chats.ids([{"role": "user", "content": prompt}], opens=True)
        is_there = bool(header) and tuple(ids[-len(header) :]) == header
        found.append(ids[: -len(header)] if is_there else ids)
    return found


def chosen(
    run_dir: str | Path, run: Run, prompts: Sequence[str], *, base: bool = False
) -> list[dict[str, float]] | None:
    """Let a run that was trained to choose say what it chooses.

    Args:
        run_dir: the output directory of its training.
        run: from `open_run`.
        prompts: what the user asks.
        base: whether to use the base model without the adapter.

    Returns:
        Of each prompt {option: its probability among the options}, the likeliest first; None where
        the training's rows did not all choose from the same options.

    Raises:
        ValueError: a prompt that is too long.
    """
    options = read_summary(run_dir).get("options")
    if not options:
        return None
    batch = Batch(prompts=worded(run_dir, run, prompts), options=options, labels=[0] * len(prompts))
    scores = torch.tensor(run.evaluate(batch, base=base).scores, dtype=torch.float64)
    shares = [dict(zip(options, row, strict=True)) for row in scores.softmax(-1).tolist()]
    return [dict(sorted(share.items(), key=lambda item: -item[1])) for share in shares]


def read_prompts(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not blank, each a prompt.

    Raises:
        ValueError: no such file, one that is not UTF-8, or one without a prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"prompts: {path} must be a text file in UTF-8, got {type(error).__name__}; write one "
            "prompt per line."
        ) from error
    prompts = [line for line in lines if line.strip()]
    require(
        bool(prompts),
        f"prompts: {path} must have a prompt on a line, got none; write one prompt per line.",
    )
    return prompts


def settings_in(run_dir: str | Path) -> TrainConfig:
    """Return the settings of a run: those in its run.yaml, or the defaults without one.

    The adapter's are in summary.json, with those that are the default.

    Raises:
        ValueError: a run.yaml that holds something else.
    """
    path = Path(run_dir) / "run.yaml"
    return settings_of(**read_yaml(path))[0] if path.is_file() else TrainConfig(Path(run_dir))


def _config_of(settings: dict[str, object], run_dir: str | Path) -> MeZOConfig:
    """The settings that a summary holds."""
    known = {field.name for field in dataclasses.fields(MeZOConfig)}
    unknown = sorted(set(settings) - known)
    require(
        not unknown,
        f"run: the settings in {Path(run_dir) / 'summary.json'} must be fields of MeZOConfig, got "
        f"{unknown}; use the mezo-sglang that has trained it.",
    )
    return MeZOConfig(**settings)  # type: ignore[arg-type]
