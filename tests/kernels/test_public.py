"""The public names of the kernels: which there are, their signatures, and that examples run."""

import doctest
import inspect
import sys

import pytest

import mezo_kernels
import mezo_kernels.cpu

NAMES = {
    "AdapterPlan": "masters, specs, outputs=None",
    "Direction": "seed, step, index=0, distribution='gaussian'",
    "SharedPrefixPlan": "qo_indptr, group_indptr, kv_indptr, kv_indices, *, row_order=None",
    "TensorSpec": "name, shape, row0=0, col0=0, global_shape=None",
    "add_directions_": "tensors, specs=None, directions=(), coefficients=(), *, backend=None",
    "backends": "",
    "label_logits": (
        "hidden, lm_head, label_rows, *, bias=None, soft_cap=0.0, logit_scale=1.0, backend=None"
    ),
    "label_nll": (
        "hidden, lm_head, targets, *, bias=None, soft_cap=0.0, logit_scale=1.0, vocab_start=0, "
        "all_gather=None, backend=None"
    ),
    "perturb_into": (
        "masters, specs=None, outputs=None, directions=(), scales=(), *, update=None, backend=None"
    ),
    "philox4x32": "counter, key, *, rounds=10",
    "sample": "spec, direction, *, backend=None, device=None",
    "shared_prefix_attention": (
        "q, k_suffix, v_suffix, k_cache, v_cache, *, qo_indptr=None, group_indptr=None, "
        "kv_indptr=None, kv_indices=None, plan=None, scale, soft_cap=0.0, return_lse=False, "
        "out=None, backend=None"
    ),
}
HELPERS = {
    "SegmentedLora": "indptr, slots, scalings, rank, *, backend=None",
    "rms_norm": "x, weight, eps, residual=None, *, backend=None",
    "rotary": "x, cos_sin, positions, *, backend=None",
    "silu_and_mul": "x, *, backend=None",
}


def signature_of(function) -> str:
    """Parameters and their defaults, without types."""
    parameters = inspect.signature(function).parameters.values()
    bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare))[1:-1]


@pytest.mark.parametrize(
    ("module", "names"),
    [(mezo_kernels, NAMES), (mezo_kernels.cpu, HELPERS)],
    ids=["mezo_kernels", "mezo_kernels.cpu"],
)
def test_names_and_signatures(module, names):
    assert sorted(module.__all__) == sorted(names)
    assert {name: signature_of(getattr(module, name)) for name in names} == names


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name, monkeypatch):
    monkeypatch.delenv("MEZO_KERNELS_BACKEND", raising=False)
    function = getattr(mezo_kernels, name)
    names = vars(sys.modules[function.__module__])
    (found,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=dict(names))
    assert found.examples
    said = []
    doctest.DocTestRunner().run(found, out=said.append)
    assert not said, "".join(said)
