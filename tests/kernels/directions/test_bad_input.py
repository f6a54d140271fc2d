"""Every Raises line: a sentence that names what, expected, got and the remedy."""

import math

import pytest
import torch

import mezo_kernels as mk

SPEC = mk.TensorSpec("t", (4, 6))
ZERO = mk.Direction(0, 0)


def tensor(dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(4, 6, dtype=dtype)


def plan(**changes) -> mk.AdapterPlan:
    arguments = {"masters": [tensor()], "specs": [SPEC], "outputs": [[tensor()]]}
    return mk.AdapterPlan(**(arguments | changes))


SHARED = tensor()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"specs": []}, "specs must have one entry per tensor, 1, got 0"),
        ({"outputs": [[]]}, r"outputs\[0\] must have one tensor per master, 1, got 0"),
        ({"masters": [torch.zeros(6, 4)]}, r"masters\[0\] must have the shape of t, \(4, 6\), got"),
        ({"masters": [torch.zeros(24)]}, r"masters\[0\] must have the shape"),
        ({"outputs": [[torch.zeros(4, 8)]]}, r"outputs\[0\]\[0\] must have the shape of t"),
        ({"masters": [tensor(torch.float64)]}, r"masters\[0\] must be one of .* got torch.float64"),
        ({"outputs": [[tensor(torch.int32)]]}, r"outputs\[0\]\[0\] must be one of"),
        ({"masters": [torch.zeros(6, 4).t()]}, r"masters\[0\] must have stride\(-1\) == 1, got"),
        ({"outputs": [[torch.zeros(6, 4).t()]]}, r"outputs\[0\]\[0\] must have stride\(-1\)"),
        ({"masters": [torch.zeros(1, 6).expand(4, 6)]}, r"masters\[0\] must have rows that do not"),
        ({"outputs": [[torch.zeros(4, 6, device="meta")]]}, r"outputs\[0\]\[0\] must be on cpu"),
        ({"masters": [tensor(torch.float16)]}, r"masters\[0\] must be torch.float32 where there"),
        ({"masters": [SHARED], "outputs": [[SHARED]]}, "same address for masters"),
        ({"outputs": [[SHARED], [SHARED]]}, r"same address for outputs\[0\]\[0\] and outputs\[1\]"),
    ],
)
def test_plan_rejects(changes, match):
    with pytest.raises(ValueError, match=match) as error:
        plan(**changes)
    assert str(error.value).startswith("AdapterPlan: ")
    # The remedy is the clause after the semicolon.
    assert ";" in str(error.value)


def test_plan_rejects_a_uid_collision():
    # Found by trying names: both hash to one 32-bit uid.
    first, second = mk.TensorSpec("tensor.935", (4, 6)), mk.TensorSpec("tensor.6239", (4, 6))
    assert first.uid == second.uid
    with pytest.raises(ValueError, match="names must have different uids"):
        mk.AdapterPlan([tensor(), tensor()], [first, second])


def test_one_name_may_appear_twice():
    # Two shards of one tensor in one plan.
    shards = [mk.TensorSpec("t", (4, 6), row, 0, (8, 6)) for row in (0, 4)]
    mk.AdapterPlan([tensor(), tensor()], shards)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_factors_must_be_finite_in_fp32(value):
    with pytest.raises(ValueError, match=r"coefficients\[1\] must be finite in fp32"):
        mk.add_directions_([tensor()], [SPEC], [ZERO, ZERO], [1.0, value])
    with pytest.raises(ValueError, match=r"scales\[0\] must be finite in fp32"):
        mk.perturb_into(plan(), directions=[ZERO], scales=[value])
    with pytest.raises(ValueError, match=r"update coefficients\[0\] must be finite in fp32"):
        mk.perturb_into(plan(), directions=[ZERO], scales=[1.0], update=([ZERO], [value]))


def test_lengths_must_match():
    with pytest.raises(ValueError, match="directions and coefficients must have one length"):
        mk.add_directions_([tensor()], [SPEC], [ZERO], [])
    with pytest.raises(ValueError, match="directions and scales must have one length"):
        mk.perturb_into(plan(), directions=[ZERO], scales=[])
    with pytest.raises(ValueError, match="directions must have one entry per slot, 1, got 2"):
        mk.perturb_into(plan(), directions=[ZERO, ZERO], scales=[1.0, 1.0])
    with pytest.raises(ValueError, match="update directions and update coefficients must have"):
        mk.perturb_into(plan(), directions=[ZERO], scales=[1.0], update=([ZERO], []))


def test_specs_and_outputs_belong_to_the_plan_or_to_the_call():
    with pytest.raises(ValueError, match="specs and outputs must be None beside an AdapterPlan"):
        mk.add_directions_(plan(), [SPEC])
    with pytest.raises(ValueError, match="specs and outputs must be None beside an AdapterPlan"):
        mk.perturb_into(plan(), outputs=[[tensor()]])
    with pytest.raises(ValueError, match="specs must be one TensorSpec per tensor, got None"):
        mk.add_directions_([tensor()])
    with pytest.raises(ValueError, match="outputs must be one sequence of tensors per slot"):
        mk.perturb_into([tensor()], [SPEC])
    with pytest.raises(ValueError, match="outputs must be one sequence of tensors per slot"):
        mk.perturb_into(plan(outputs=None))


def test_native_module_checks_addresses(native):
    with pytest.raises(ValueError, match="tensors must be an address, got 0 for 1 rows"):
        native.cpu_add_directions(0, 1, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="the size of directions must be >= 0, got -1"):
        native.cpu_add_directions(0, 0, 0, 0, -1, 1)
    with pytest.raises(RuntimeError, match="name must be 'auto', 'portable' or an instruction set"):
        native.set_isa("sse9")
