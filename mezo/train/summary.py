"""What a training run did, in numbers and in sentences."""

from __future__ import annotations

import dataclasses

from mezo.results import EvalResult, EvalStatus, StepResult, StepStatus, is_lost

# Above this share of its steps a bad status is a problem of the run.
_MANY = 0.1


@dataclasses.dataclass(frozen=True)
class TrainSummary:
    """What a training run did.

    Args:
        steps: steps taken.
        skipped: steps whose loss was not finite.
        seconds: spent in steps.
        tokens: computed by the engine in steps, prompts included.
        prompt_tokens: of these, tokens of prompts that run once on the base model (activated).
        reused_tokens: prompt tokens that rows got from the cache.
        before: held-out scores before the first step, or None.
        after: held-out scores after the last step, or None. Of a run that was stopped they are the
            last ones taken, or None if there were none after a step.
        num_steps: steps asked for.
        statuses: steps of each `StepStatus` that occurred, by its name.
        lost_share: the largest `StepResult.lost_share` of a step that was not skipped, or None.
        problems: sentences on why the adapter is not to be trusted as it is; empty if all went
            well: the stream ended early or an exception stopped the run, a tenth of the steps or
            more had a bad status, the last step was skipped, or an evaluation is not finite.
    """

    steps: int
    skipped: int
    seconds: float
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    before: EvalResult | None
    after: EvalResult | None
    num_steps: int = 0
    statuses: dict[str, int] = dataclasses.field(default_factory=dict)
    lost_share: float | None = None
    problems: tuple[str, ...] = ()


class Tally:
    """Adds up what steps did.

    Args:
        num_steps: steps asked for.
        first: steps that the run had taken before.
    """

    def __init__(self, num_steps: int, first: int) -> None:
        self.num_steps, self.first = num_steps, first
        self.num_results = 0
        self.seconds = 0.0
        self.tokens = self.prompt_tokens = self.reused_tokens = 0
        self.statuses: dict[str, int] = {}
        self.num_lost = 0
        self.lost_share: float | None = None
        self.last_status = StepStatus.OK
        self.before: EvalResult | None = None
        self.after: EvalResult | None = None
        self.stopped_by: str | None = None
        self.has_ended = False  # used the last batch
        self.is_finished = False  # and the last evaluation
        self.is_stopped_early = False  # by a callback or for want of a better evaluation
        self.evaluated_at: int | None = None  # steps before the last evaluation

    def add(self, result: StepResult, seconds: float) -> None:
        """Note a step."""
        self.num_results += 1
        self.seconds += seconds
        self.tokens += result.tokens
        self.prompt_tokens += result.prompt_tokens
        self.reused_tokens += result.reused_tokens
        self.last_status = result.status
        name = result.status.name
        self.statuses[name] = self.statuses.get(name, 0) + 1
        if result.status is not StepStatus.NONFINITE_LOSS and result.lost_share is not None:
            self.num_lost += is_lost(result.lost_share)
            self.lost_share = max(result.lost_share, self.lost_share or 0.0)

    def summary(self, run_steps: int) -> TrainSummary:
        """What has been done; ``run_steps`` is the run's count, which an interruption may raise."""
        steps = run_steps - self.first
        return TrainSummary(
            steps=steps,
            skipped=self.statuses.get(StepStatus.NONFINITE_LOSS.name, 0),
            seconds=self.seconds,
            tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            before=self.before,
            after=self.after,
            num_steps=self.num_steps,
            statuses=dict(self.statuses),
            lost_share=self.lost_share,
            problems=tuple(self._problems(steps)),
        )

    def _problems(self, steps: int) -> list[str]:
        """See `TrainSummary.problems`."""
        found = []
        if self.stopped_by is not None:
            found.append(
                f"Training was stopped by {self.stopped_by} after {steps} of {self.num_steps} "
                "steps."
            )
        elif self.has_ended and steps < self.num_steps and not self.is_stopped_early:
            found.append(
                f"The stream of batches ended after {steps} of {self.num_steps} steps; repeat the "
                "data or lower num_steps."
            )
        skipped = self.statuses.get(StepStatus.NONFINITE_LOSS.name, 0)
        equal = self.statuses.get(StepStatus.EQUAL_LOSSES.name, 0)
        if self.last_status is StepStatus.NONFINITE_LOSS or self._is_many(skipped):
            found.append(
                f"{skipped} of {steps} steps were skipped, the last one "
                f"{'too' if self.last_status is StepStatus.NONFINITE_LOSS else 'not'}, because a "
                "loss or its update was not finite; lower lr, or change eps."
            )
        if self._is_many(equal):
            found.append(
                f"Both losses were equal in {equal} of {steps} steps, which moved nothing; change "
                "eps, lower lr if the weights have grown, or use slots of a wider dtype."
            )
        if self._is_many(self.num_lost):
            found.append(
                f"Rounding removed most of the perturbation in {self.num_lost} of {steps} steps "
                f"(up to {100.0 * (self.lost_share or 0.0):.0f} % of an adapter factor's "
                "elements), so their estimates say little; raise eps, lower lr if the weights have "
                "grown, or use slots of a wider dtype."
            )
        for when, scores in (("before the first step", self.before), ("taken last", self.after)):
            if scores is not None and scores.status is not EvalStatus.OK:
                found.append(
                    f"The held-out evaluation {when} was not finite: loss {scores.loss!r}, "
                    f"{scores.num_nonfinite} of {scores.num_examples} examples without a score."
                )
        return found

    def _is_many(self, count: int) -> bool:
        """Whether so many steps of a kind are a problem."""
        return count > 0 and count >= _MANY * self.num_results
