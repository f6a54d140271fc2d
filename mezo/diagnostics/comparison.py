"""One batch of a run against the checkpoint in transformers: is this the model that was meant?

An engine may have a model of its own that differs from the reference (SGLang's Mistral has no
sliding window). Both score the same rows, on the base model and under one perturbed adapter.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mezo.core.messages import Check
from mezo.core.rows import BASE, Scores
from mezo.data.batch import EncodedBatch
from mezo.engines.linears import ModelLinears, linears_of
from mezo.engines.selftest import sample_batch

if TYPE_CHECKING:
    from mezo.run import Run

logger = logging.getLogger(__name__)

# Nats per token by which kernels only may differ, by the engine's dtype.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
_SCALE = 0.02  # of the perturbation of the adapter that is compared
_LENGTHS = (2, 5, 11, 16, 23, 32)
_BEHIND_WINDOW = (4, 24)  # prompt tokens beyond a sliding window
_NAME = "against transformers"
_HEADROOM = 1.25  # memory for activations and the load, over the weights'


@dataclasses.dataclass(frozen=True)
class _Reference:
    """How the checkpoint can be loaded here."""

    config: Any
    dtype: torch.dtype


def compare(run: Run) -> Check:
    """Compare token log-likelihoods of one batch with transformers, loaded from the same path.

    Args:
        run: an open run.

    Returns:
        The check, with the largest difference in nats; skipped, with the reason, where the
        checkpoint cannot be loaded or does not fit into this host's memory.

    Numerics: the reference runs on the CPU in fp32, or in the checkpoint's dtype where only that
        fits. Differences are those of single tokens.
    Cost: loads the checkpoint; one forward per row and adapter.
    """
    if run.session.engine_name == "transformers":
        return _skipped("the engine is transformers itself")
    reference = _reference(run.session.model_path)
    if isinstance(reference, str):
        return _skipped(reference)
    window = _window(reference.config)
    lengths = [*_LENGTHS, *((window + n for n in _BEHIND_WINDOW) if window else ())]
    batch = sample_batch(run, lengths=lengths, scored=1)
    ours = _scores(run, batch)
    theirs = _reference_scores(run, reference, batch)
    differences = {
        what: [abs(a - b) for a, b in zip(ours[what], theirs[what], strict=True)] for what in ours
    }
    return _judged(run, batch, differences, window, reference.dtype)


def warn_of_difference(run: Run) -> Check:
    """`compare`, with a warning where the difference is above the tolerance, or nothing compared.

    Returns:
        The check.
    """
    check = compare(run)
    if check.is_skipped:
        logger.warning("run %r: not compared with transformers: %s", run.name, check.detail)
    elif not check.is_ok:
        logger.warning(
            "run %r: the engine's model is not the reference's: %s", run.name, check.detail
        )
    return check


def _skipped(reason: str) -> Check:
    return Check(_NAME, True, reason, is_skipped=True)


def _reference(path: str) -> _Reference | str:
    """How to load the checkpoint at ``path``, or why it cannot be."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        return f"transformers cannot read the config of {path} ({type(error).__name__}: {error})"
    linears = linears_of(config)
    if not isinstance(linears, ModelLinears):
        return linears
    if getattr(config, "quantization_config", None) is not None:
        return "the checkpoint is quantised"
    free = available_memory()
    own = getattr(config, "dtype", None)
    for dtype in (torch.float32, own if isinstance(own, torch.dtype) else torch.float32):
        if linears.num_parameters * dtype.itemsize * _HEADROOM <= free:
            return _Reference(config, dtype)
    need = linears.num_parameters * dtype.itemsize * _HEADROOM
    return f"the checkpoint needs {need / 1e9:.1f} GB of memory here, {free / 1e9:.1f} GB are free"


def available_memory() -> int:
    """Bytes that this process can still use, within its control group's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


def _window(config: Any) -> int | None:
    """Tokens of the checkpoint's sliding window, where some layer has one."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not window or (kinds and not any("sliding" in str(kind) for kind in kinds)):
        return None
    return int(window)


def _scores(run: Run, batch: EncodedBatch) -> dict[str, list[float]]:
    """The token log-likelihoods of the base model and of theta + scale z."""
    base: Scores = run.session.score(batch.rows, BASE)
    run.measure(batch, eps=_SCALE)  # writes the perturbed slots
    adapted = run.session.score(batch.rows, "plus0")
    return {"base": base.logprob_sums[BASE], "adapted": adapted.logprob_sums["plus0"]}


def _reference_scores(
    run: Run, reference: _Reference, batch: EncodedBatch
) -> dict[str, list[float]]:
    """The same of the checkpoint in transformers; row by row, so that none is padded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from mezo.engines.transformers import TransformersSession
    from mezo.run import Run as AnyRun

    transformers_logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        run.session.model_path, dtype=reference.dtype, config=reference.config
    )
    config = dataclasses.replace(run.config, num_directions=1)
    session = TransformersSession(model, config, run.session.tokenizer)
    weights = run.weights()
    for spec, master in zip(session.state.specs, session.state.masters, strict=True):
        master.copy_(weights[spec.name])
    session.state.restore()  # its slot holds theta_0
    found: dict[str, list[float]] = {"base": [], "adapted": []}
    with AnyRun(session, config) as other:
        other.steps = run.steps
        for i in range(len(batch.rows)):
            for what, values in _scores(other, _row(batch, i)).items():
                found[what] += values
    del model, session, other
    gc.collect()
    return found


def _row(batch: EncodedBatch, i: int) -> EncodedBatch:
    """One row of a batch of completions."""
    one, rows = slice(i, i + 1), batch.rows
    rows = dataclasses.replace(
        rows,
        tokens=rows.tokens[one],
        prefix_lens=rows.prefix_lens[one],
        prompt_lens=rows.prompt_lens[one],
        is_normalised=rows.is_normalised[one],
    )
    targets = dataclasses.replace(batch.targets, counts=(batch.targets.counts[i],))
    return EncodedBatch(rows, targets)


def _judged(
    run: Run,
    batch: EncodedBatch,
    differences: dict[str, list[float]],
    window: int | None,
    dtype: torch.dtype,
) -> Check:
    """Put the differences into words."""
    tolerance = max(TOLERANCE.get(d, TOLERANCE[torch.bfloat16]) for d in (run.session.dtype, dtype))
    sizes = [len(tokens) - 1 for tokens in batch.rows.tokens]  # the last is only scored
    worst = {what: max(values) for what, values in differences.items()}
    detail = (
        f"largest difference of a token's log-likelihood: base model {worst['base']:.2g} nats, "
        f"perturbed adapter {worst['adapted']:.2g} nats ({len(sizes)} rows of {min(sizes)} to "
        f"{max(sizes)} tokens, tolerance {tolerance:g}, reference in {str(dtype)[6:]})"
    )
    if window:
        detail += _window_words(window, sizes, differences)
    is_ok = all(value <= tolerance for value in worst.values())  # False for NaN
    return Check(_NAME, is_ok, detail)


def _window_words(window: int, sizes: Sequence[int], differences: dict[str, list[float]]) -> str:
    """What rows within and beyond the checkpoint's sliding window say."""
    beyond = [i for i, size in enumerate(sizes) if size > window]
    if not beyond:
        return (
            f"; the checkpoint has a sliding window of {window} tokens, which no row that this "
            "engine accepts exceeds: whether it is kept cannot be seen"
        )
    both = [max(a, b) for a, b in zip(*differences.values(), strict=True)]
    within = max((both[i] for i in range(len(sizes)) if i not in beyond), default=0.0)
    return (
        f"; sliding window of {window} tokens: {within:.2g} nats in rows within it, "
        f"{max(both[i] for i in beyond):.2g} in longer ones"
    )
