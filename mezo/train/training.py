"""Train an adapter on own data or a task, evaluate it, save it: what `mezo train` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from mezo._closing import closing
from mezo._config_checks import chooses
from mezo._inputs import require
from mezo.checkpoint.atomic import check_output
from mezo.checkpoint.identity import model_identity
from mezo.checkpoint.peft import ADAPTER_FILES
from mezo.checkpoint.replayed import write_adapter
from mezo.checkpoint.run_directory import TRAJECTORY
from mezo.checkpoint.trajectory import read
from mezo.config import MeZOConfig, TrainConfig
from mezo.data.batch import EncodedBatch
from mezo.data.sampling import batches
from mezo.engines import ENGINES
from mezo.results import EvalResult
from mezo.run import Run, attach
from mezo.settings import as_yaml
from mezo.tasks import assets
from mezo.train.base_model import launch_options, load_tokenizer
from mezo.train.best import Best, check_metric
from mezo.train.checkpoints import Checkpoints
from mezo.train.encoded import EncodedExamples, batches_of, checked, streamed
from mezo.train.evaluate import evaluate
from mezo.train.examples import TrainingExamples, load_examples
from mezo.train.metrics import metrics_of
from mezo.train.model_card import IN_MEMORY
from mezo.train.recorder import Recorder, recording
from mezo.train.resume import Past, check_continues, past_of, recall_best
from mezo.train.run_files import (
    FILES,
    TrainingLog,
    can_plot,
    closing_words,
    leave_files,
    record_of,
)
from mezo.train.saving import train_and_save
from mezo.train.summary import TrainSummary
from mezo.train.trainer import MeZOTrainer
from mezo.train.trainer_callbacks import (
    TrainerCallbacks,
    apart,
    argument_values,
    stops_early,
    trackers,
)
from mezo.train.upload import Upload
from mezo.train.user_metrics import as_numbers
from mezo.train.watch import Watch, check_rows


def train(
    settings: TrainConfig,
    config: MeZOConfig,
    *,
    data: Any = None,
    eval_data: Any = None,
    engine: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[Any] = (),
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
) -> tuple[TrainSummary, dict[str, Any]]:
    """Train, evaluate before and after, save the adapter, the log, the plot and the summary.

    The adapter is written first. Whatever ends the training, Ctrl-C included, it is
    written with the steps taken until then. Nothing that fails afterwards removes it.

    Args:
        settings: the training.
        config: the adapter and the estimator.
        data: rows or a data set in memory, in place of ``settings.data``.
        eval_data: the same in place of ``settings.eval_data``.
        engine: a handle as in `mezo.attach`, in place of starting ``settings.engine``.
        tokenizer: the model's; None: loaded from ``settings.model``.
        callbacks: see `MeZOTrainer`.
        compute_metrics: as in `transformers.Trainer`: gets an ``EvalPrediction`` with the options'
            scores (nats) ``[N, C]`` and the labels ``[N]`` of the held-out examples; returns
            {name: number}, NumPy's and torch's too, or None for nothing.

    Returns:
        The summary, and the content of summary.json; look at its "problems".

    Raises:
        ValueError: an unknown task or engine, output cannot be written to, bad data, or an example
            that is too long for the engine.
        AssetError: the model or the data cannot be fetched.
        ImportError: the engine or a tracker is not installed.
        BaseException: whatever stopped the training; if a step was taken, the files are there and
            the exception has a `PartialTraining` as ``partial_training``.
    """
    chosen = ENGINES[ENGINES.check(settings.engine, "train: ")]
    check_output(settings.output, FILES)
    if (settings.output / "adapter").exists():  # else it is made when there is something to save
        check_output(settings.output / "adapter", ADAPTER_FILES)
    upload = Upload.of(settings)
    theirs, more = apart(callbacks)
    if theirs := [*trackers(settings.report_to), *theirs]:
        more.append(TrainerCallbacks(theirs, argument_values(settings, config)))
    past = past_of(settings)
    has_plots = can_plot()
    model = settings.model
    if model is None:
        model = str(assets.model_dir()) if engine is None else "model in memory"
    if tokenizer is None:
        require(
            engine is None or settings.model is not None,
            "train: a model in memory must come with its tokenizer, got none, and it does not say "
            "where it was loaded from; pass tokenizer=...",
        )
        tokenizer = load_tokenizer(model, settings)
    require(
        data is not None or settings.data != IN_MEMORY,
        "train: data must be a file, a folder or a hub name, got the settings of a training on "
        "rows in memory; pass data, or call mezo.finetune with the rows.",
    )
    origin = settings if eval_data is None else dataclasses.replace(settings, eval_data=eval_data)
    examples = load_examples(origin, config, tokenizer, data=data)
    for sentence in examples.sentences:
        print(sentence, flush=True)
    check_choice(settings, examples, callbacks)
    config = dataclasses.replace(config, invocation=examples.invocation)
    rows = EncodedExamples.of(examples, tokenizer, config)
    identity, data_hash = model_identity(model), rows.identity()
    if past is not None:
        now = yaml.safe_load(as_yaml(settings, config))
        check_continues(past, settings, now, model=identity, data=data_hash)
        print(f"Going on with {past.source} behind step {past.num_steps}.", flush=True)
    compute = None if compute_metrics is None else as_numbers(compute_metrics)
    metrics = metrics_of(examples.metric, examples.held_out, compute)
    if compute is None and chooses(settings):  # what the user's function names is not known yet
        check_metric(settings.best_metric, examples.held_out, metrics)
    with (
        _engine(chosen, engine, model, settings, config, rows) as handle,
        closing((run := attach(handle, config, tokenizer=tokenizer)).close),
    ):
        if engine is not None:  # the caller's may be another one than the settings'
            settings = dataclasses.replace(settings, engine=run.session.engine_name)
        log = TrainingLog(settings, config, model, can_plot=has_plots, past=past)
        with recording(run, settings, past, model=identity, data=data_hash) as recorder:
            trainer = _trainer(settings, run, examples, rows, past, recorder, [log, *more], metrics)
            reported = metrics_of(examples.metric, examples.test, compute)
            record = _train(settings, trainer, log, examples, rows, reported, model)
    print(closing_words(record, settings.output, has_plot=log.has_plot))
    if upload is not None:
        upload(settings.output / "adapter")
    return trainer.summary, record


def check_choice(
    settings: TrainConfig, examples: TrainingExamples, callbacks: Sequence[Any] = ()
) -> None:
    """Raise where a training is to choose by evaluations and has nothing to evaluate on."""
    names = {
        "load_best": settings.load_best,
        "patience": settings.patience is not None,
        "save_strategy 'best'": settings.save_strategy == "best",
        "EarlyStoppingCallback": any(map(stops_early, callbacks)),
    }
    asked = [name for name, is_asked in names.items() if is_asked]
    require(
        not asked or bool(examples.held_out),
        f"train: {' and '.join(asked)} must come with held-out examples, got none; give eval_data, "
        "or more rows.",
    )


def _engine(
    chosen: Any,
    engine: Any,
    model: str,
    settings: TrainConfig,
    config: MeZOConfig,
    rows: EncodedExamples,
) -> AbstractContextManager[Any]:
    """The caller's engine, or one that is started."""
    if engine is not None:
        return nullcontext(engine)
    print(f"Starting the {settings.engine} engine with {Path(model).name} ...", flush=True)
    options = launch_options(settings)
    if config.prefix == "activated":  # its prompts' keys and values are the same in every step
        options["cache_tokens"] = rows.prompt_tokens()
    handle: AbstractContextManager[Any] = chosen.launch(
        model, config, threads=settings.threads, **options
    )
    return handle


def _trainer(
    settings: TrainConfig,
    run: Run,
    examples: TrainingExamples,
    rows: EncodedExamples,
    past: Past | None,
    recorder: Recorder,
    callbacks: Sequence[Any],
    metrics: Callable[[EvalResult], dict[str, float]] | None,
) -> MeZOTrainer:
    """The loop, on examples that are tokenised once."""
    train, per_step = examples.train, settings.examples_per_step
    stream: Iterable[Any]
    per_epoch, begin = None, 0 if past is None else past.num_steps
    if isinstance(train, Sequence):
        assert rows.train is not None
        encoded = checked(run, rows.train, train)
        check_rows(run, encoded)
        per_epoch = len(train) // per_step
        order = batches(
            range(len(train)), per_step, run.config.seed, shuffle=settings.shuffle, start=begin
        )
        stream = map(encoded.select, order)
    else:
        stream = streamed(run, islice(train, begin * per_step, None), per_step)
    num_steps = settings.steps(len(train) if isinstance(train, Sequence) else None)
    every = per_epoch if settings.eval_strategy == "epoch" else settings.eval_every
    save_every = per_epoch if settings.save_strategy == "epoch" else settings.save_every
    checkpoints = Checkpoints(
        settings.output,
        every=save_every,
        limit=settings.save_total_limit,
        keeps_best=settings.save_strategy == "best",
        before=recorder.sync,
        num_steps=begin,
    )
    best = Best(
        settings.best_metric,
        greater_is_better=settings.greater_is_better,
        patience=settings.patience,
    )
    if past is not None and chooses(settings):
        recall_best(best, past)
    return MeZOTrainer(
        run,
        stream,
        num_steps=num_steps,
        schedule=settings.schedule,
        held_out=batches_of(run, examples.held_out, settings.eval_batch_size, rows.held_out),
        eval_every=every,
        callbacks=[recorder, *callbacks, Watch(run)],
        warmup_steps=settings.warmup_steps or int(settings.warmup_ratio * num_steps),
        steps_per_epoch=per_epoch,
        best=best if chooses(settings) else None,
        checkpoints=checkpoints,
        metrics=metrics,
        past=past,
    )


def _train(
    settings: TrainConfig,
    trainer: MeZOTrainer,
    log: TrainingLog,
    examples: TrainingExamples,
    rows: EncodedExamples,
    metrics: Callable[[EvalResult], dict[str, float]] | None,
    model: str,
) -> dict[str, Any]:
    """Train and leave the files, whatever happens; the adapter comes first."""
    run, test = trainer.run, None
    if examples.test is not examples.held_out:
        test = batches_of(run, examples.test, settings.eval_batch_size, rows.test)
    scores: dict[str, EvalResult] = {}
    is_best_loaded = False

    def scored(test: Sequence[EncodedBatch], *, is_base: bool = False) -> EvalResult:
        found = evaluate(run, test, base=is_base)
        return found if metrics is None else dataclasses.replace(found, metrics=metrics(found))

    def finish() -> None:
        """Put the best weights back, and report on examples that chose nothing."""
        nonlocal is_best_loaded
        best = trainer.best
        if settings.load_best and best is not None and best.weights is not None:
            run.set_weights(best.weights)
            is_best_loaded = True
            if best.evaluation is not None:
                scores["after"] = best.evaluation
        if test is not None:
            scores["after"] = scored(test)

    def rebuild(directory: Path) -> Path:
        return write_adapter(read(settings.output / TRAJECTORY), directory)

    def leave() -> dict[str, Any]:
        record = record_of(
            settings, trainer, log, examples, scores, model=model, is_best_loaded=is_best_loaded
        )
        leave_files(settings, run.config, record, log)
        return record

    try:
        if test is not None:
            # theta_0 adds nothing to the base model, and a training that goes on is behind it.
            scores["before"] = scored(test, is_base=trainer.past is not None)
        train_and_save(trainer, settings.output / "adapter", finish=finish, rebuild=rebuild)
    except BaseException:
        if trainer.summary.steps:
            leave()
        raise
    return leave()
