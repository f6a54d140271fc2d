"""Numbers that mean nothing are said to: perturbations lost to rounding, equal losses, NaN."""

from __future__ import annotations

import logging
import math
import pickle
import random

import pytest
import torch
import transformers

import mezo
from mezo.core.rows import run_slots
from mezo.core.state import AdapterSlot, AdapterState
from mezo_kernels import Direction, TensorSpec, sample
from tests.support.tiny import LINEARS, load_model, random_batch

SPECS = [
    TensorSpec("layers.0.q_proj.lora_A", (8, 300)),
    TensorSpec("layers.0.q_proj.lora_B", (96, 8)),
    TensorSpec("layers.1.o_proj.lora_A", (8, 64)),
    TensorSpec("layers.1.o_proj.lora_B", (300, 8)),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_state(dtype: torch.dtype, *, num_directions: int = 1) -> AdapterState:
    slots = [
        AdapterSlot(name, name, [torch.zeros(spec.shape, dtype=dtype) for spec in SPECS])
        for name in run_slots(num_directions)
    ]
    return AdapterState(SPECS, seed=5, distribution="gaussian", slots=slots)


def lost_elements(state: AdapterState, step: int, eps: float, dtype: torch.dtype) -> dict:
    """Per factor, the share of elements whose two roundings are equal: from the definition."""
    state.flush()
    factors: dict[str, list[torch.Tensor]] = {"lora_A": [], "lora_B": []}
    scale = torch.tensor(eps, dtype=torch.float32).double()
    for spec, master in zip(state.specs, state.masters, strict=True):
        z = sample(spec, Direction(state.seed, step)).double()
        # One rounding to fp32, then one to the slots' dtype.
        plus, minus = ((master.double() + s * scale * z).float().to(dtype) for s in (1, -1))
        factors[spec.name[-6:]].append((plus == minus).reshape(-1))
    return {name: torch.cat(parts).double().mean().item() for name, parts in factors.items()}


def load_as(directory: str, dtype: torch.dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-7, 1e-9])
def test_lost_elements_are_counted(dtype, eps):
    state = make_state(dtype)
    for number, coefficients in enumerate(([], [0.3], [1e-3])):
        if coefficients:
            state.defer_update(number - 1, coefficients)
        expected = lost_elements(state, number, eps, dtype)
        state.perturb(number, eps)
        share = state.lost_share(eps)
        if not coefficients and dtype is not torch.float16:  # whose smallest number is 6e-8
            assert expected["lora_B"] == 0  # B is 0: what is lost is A's
        if coefficients != [1e-3]:  # too small an update to count again
            assert share == max(expected.values())
        # It is still nearly right then: another direction, nearly the same weights.
        assert share == pytest.approx(max(expected.values()), abs=0.02)
    assert state.lost_share(0.0) is None


def test_the_paper_s_eps_loses_little_and_a_tiny_one_most():
    shares = {}
    for eps in (1e-2, 1e-5):
        state = make_state(torch.bfloat16)
        state.perturb(0, eps)
        shares[eps] = state.lost_share(eps)
    assert shares[1e-2] < 0.02
    assert shares[1e-5] > 0.8


def test_slots_are_read_again_when_eps_or_theta_change_by_a_factor_of_2(monkeypatch):
    from mezo.core.rounding import RoundingWatch

    reads = []
    count = RoundingWatch._count
    monkeypatch.setattr(RoundingWatch, "_count", lambda self: reads.append(1) or count(self))
    state = make_state(torch.bfloat16)

    def perturb(eps: float) -> int:
        before = len(reads)
        state.perturb(0, eps)
        state.lost_share(eps)
        return len(reads) - before

    assert perturb(1e-2) == 1
    assert perturb(1e-2) == perturb(1.1e-2) == perturb(0.9e-2) == 0
    assert perturb(1e-3) == 1  # another binade
    assert perturb(1e-2) == perturb(1e-3) == 0  # both are known
    state.defer_update(0, [1e-3])
    assert perturb(1e-2) == 1  # B is no longer 0
    counted = 0
    for number in range(1, 300):
        state.defer_update(number, [1e-3])
        counted += perturb(1e-2)
    # |B| grows with the root of the steps, so that it doubles after about 4, 16, 64 and 256.
    assert counted in (3, 4)


def test_the_update_does_not_mind_the_count():
    """The same bits in all slots and masters as without anything that counts."""
    counted, plain = make_state(torch.bfloat16), make_state(torch.bfloat16)
    for number in range(5):
        for state in (counted, plain):
            state.perturb(number, 1e-3)
        counted.lost_share(1e-3)
        for state in (counted, plain):
            state.defer_update(number, [0.1])
    counted.flush()
    plain.flush()
    assert torch.equal(counted.arena, plain.arena)


def test_bf16_with_a_tiny_eps_says_so(tiny_model_dir, caplog):
    rng = random.Random(0)
    model = load_as(tiny_model_dir("llama"), torch.bfloat16)
    config = mezo.MeZOConfig(rank=4, target_modules=LINEARS, lr=1e-4, eps=1e-5)
    with caplog.at_level(logging.WARNING, "mezo"), mezo.attach(model, config) as run:
        results = [run.step(random_batch(rng, kind="classification")) for _ in range(30)]
        names = [result.status.name for result in results]
        assert set(names) <= {"LOST_PERTURBATION", "EQUAL_LOSSES"}
        assert names.count("LOST_PERTURBATION") > 10
        equal = [r.loss_plus == r.loss_minus for r in results]
        assert [name == "EQUAL_LOSSES" for name in names] == equal
        assert all(r.lost_share > 0.8 for r in results)
        assert all(r.coefficients == (-1e-4 * r.projected_grads[0],) for r in results)  # as before
        with pytest.raises(mezo.StepError, match=r"LOST_PERTURBATION|EQUAL_LOSSES") as raised:
            run.step(random_batch(rng), throw=True)
        assert raised.value.result.step == 30
        assert run.steps == 31
        again = pickle.loads(pickle.dumps(raised.value))
        assert (str(again), again.result) == (str(raised.value), raised.value.result)
    said = [r.getMessage() for r in caplog.records if "rounding to bfloat16" in r.getMessage()]
    assert 1 <= len(said) <= 3  # once, and again when half as much is left
    assert "% of an adapter factor's elements at eps 1e-05" in said[0]
    assert "raise eps, or start the engine in float32" in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_share_of_a_step_is_that_of_its_weights(tiny_model_dir, dtype):
    rng = random.Random(8)
    config = mezo.MeZOConfig(rank=4, target_modules=LINEARS, lr=1e-4, eps=1e-4, seed=3)
    with mezo.attach(load_as(tiny_model_dir("llama"), dtype), config) as run:
        weights = run.weights()
        result = run.step(random_batch(rng))
    equal: dict[str, list[torch.Tensor]] = {"lora_A": [], "lora_B": []}
    scale = torch.tensor(config.eps, dtype=torch.float32).double()
    for name, theta in weights.items():
        z = sample(TensorSpec(name, tuple(theta.shape)), Direction(3, 0)).double()
        plus, minus = ((theta.double() + s * scale * z).float().to(dtype) for s in (1, -1))
        equal[name[-6:]].append((plus == minus).reshape(-1))
    shares = [torch.cat(parts).double().mean().item() for parts in equal.values()]
    assert 0.05 < result.lost_share == max(shares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_paper_s_eps_is_fine(tiny_model_dir, dtype, caplog):
    rng = random.Random(1)
    config = mezo.MeZOConfig(rank=4, target_modules=LINEARS, lr=1e-5, eps=1e-2)
    with mezo.attach(load_as(tiny_model_dir("llama"), dtype), config) as run:
        results = [run.step(random_batch(rng)) for _ in range(10)]
        assert run.pair_losses(random_batch(rng), eps=0.0).lost_share is None
    assert all(r.status is mezo.StepStatus.OK for r in results)
    assert max(r.lost_share for r in results) < (0.02 if dtype is torch.bfloat16 else 1e-4)
    assert not caplog.records


def test_equal_losses_have_a_status_and_are_said_once(tiny_model_dir, caplog):
    rng = random.Random(2)
    config = mezo.MeZOConfig(rank=4, target_modules=LINEARS, eps=1e-12)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        results = [run.step(random_batch(rng)) for _ in range(3)]
        assert [r.status.name for r in results] == ["EQUAL_LOSSES"] * 3
        assert results[0].projected_grads == (0.0,)
        with pytest.raises(RuntimeError, match="status must be OK, got EQUAL_LOSSES"):
            run.step(random_batch(rng), throw=True)
        # Equal by construction and not a fault.
        assert run.pair_losses(random_batch(rng), eps=0.0).status is mezo.StepStatus.OK
    said = [r.getMessage() for r in caplog.records if "both losses were equal" in r.getMessage()]
    assert len(said) == 1


def test_fp16_with_a_huge_lr_is_no_success(tiny_model_dir, caplog):
    rng = random.Random(3)
    model = load_as(tiny_model_dir("llama"), torch.float16)
    config = mezo.MeZOConfig(rank=4, target_modules=LINEARS, lr=1e4)
    held_out = [random_batch(rng, size=6, kind="classification") for _ in range(2)]
    batches = [random_batch(rng) for _ in range(30)]
    with mezo.attach(model, config) as run:
        summary = mezo.MeZOTrainer(run, batches, num_steps=30, held_out=held_out).train()
        scores = run.evaluate(held_out[0])
    assert scores.accuracy is None  # was 0.5 or so: the first option of each
    assert scores.predictions == [None] * 6
    assert math.isnan(scores.loss)
    assert scores.num_nonfinite == scores.num_examples == 6
    assert scores.status is mezo.EvalStatus.NONFINITE_SCORES
    assert summary.steps == 30
    assert summary.statuses == {"OK": 1, "NONFINITE_LOSS": 29}
    assert summary.skipped == 29
    assert (summary.after.accuracy, summary.after.num_nonfinite) == (None, 12)
    assert summary.before.accuracy is not None
    assert summary.before.status is mezo.EvalStatus.OK
    assert [p.split(",")[0] for p in summary.problems if "skipped" in p] == [
        "29 of 30 steps were skipped"
    ]
    assert any("evaluation taken last was not finite: loss nan" in p for p in summary.problems)
    skips = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert sum("step 1: a loss or its update was not finite" in s for s in skips) == 1
    assert sum("steps 1 to 10 were all skipped" in s for s in skips) == 1


def test_a_good_run_has_no_problems(tiny_model_dir):
    rng = random.Random(4)
    config = mezo.MeZOConfig(rank=2, target_modules=LINEARS, lr=1e-5)
    batches = [random_batch(rng) for _ in range(4)]
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        summary = mezo.MeZOTrainer(run, batches, num_steps=4, held_out=batches[:1]).train()
    assert summary.problems == ()
    assert summary.statuses == {"OK": 4}
    assert (summary.num_steps, summary.lost_share) == (4, pytest.approx(0.0, abs=1e-3))


def test_completions_without_a_finite_score_are_counted(tiny_model_dir):
    rng = random.Random(5)
    config = mezo.MeZOConfig(rank=2, target_modules=LINEARS)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        run.apply_update([1e30])
        scores = run.evaluate(random_batch(rng, size=5))
    assert not math.isfinite(scores.loss)
    assert (scores.accuracy, scores.predictions, scores.num_nonfinite) == (None, None, 5)


def test_the_bias_of_losses_that_are_not_finite_is_an_error(tiny_model_dir):
    rng = random.Random(6)
    config = mezo.MeZOConfig(rank=2, target_modules=LINEARS, prefix="detached", eps=1e30)
    with (
        mezo.attach(load_model(tiny_model_dir("llama")), config) as run,
        pytest.raises(mezo.NonfiniteLossError, match="losses and their update must be finite"),
    ):
        mezo.prefix_bias(run, [random_batch(rng)])
