"""Which backend a call gets, and what is said when one is missing."""

import importlib.util
import logging

import pytest
import torch

import mezo_kernels as mk
import mezo_kernels.cpu
from mezo_kernels.backends import OPS, resolve


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """These tests choose the environment's backend themselves."""
    monkeypatch.delenv("MEZO_KERNELS_BACKEND", raising=False)


def draw(**arguments):
    return mk.sample(mk.TensorSpec("t", (2, 2)), mk.Direction(0, 0), **arguments)


def test_backends_names_all_and_gives_sentences():
    found = mk.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"] is None
    for reason in found.values():
        assert reason is None or (reason[0].isupper() and reason.endswith("."))
    if not torch.cuda.is_available():
        assert found["cuda"] is not None


def test_the_cpu_backend_is_chosen_where_it_is_built(native):
    assert resolve("sample", None, "cpu") == "cpu"


OPERATIONS = (
    *("sample", "add_directions_", "perturb_into"),
    *("shared_prefix_attention", "label_nll", "label_logits"),
    *mezo_kernels.cpu.__all__,
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_finds_its_backends(native, name):
    op = OPS[name]
    assert resolve(name, None, "cpu") == "cpu"
    assert "reference" in op.needs
    assert set(op.needs) <= set(mk.backends())
    if op.package is not None:
        for backend in op.needs:
            assert importlib.util.find_spec(f"{op.package}.{backend}") is not None


def test_the_environment_speaks_to_those_that_listen(native, monkeypatch):
    monkeypatch.setenv("MEZO_KERNELS_BACKEND", "reference")
    for name in OPERATIONS:
        expected = "reference" if OPS[name].follows_environment else "cpu"
        assert resolve(name, None, "cpu") == expected
    # Where an operation does not have what the environment names, the best one is used.
    monkeypatch.setenv("MEZO_KERNELS_BACKEND", "cuda")
    assert resolve("label_nll", None, "cpu") == "cpu"


def test_explicit_beats_environment(native, monkeypatch):
    monkeypatch.setenv("MEZO_KERNELS_BACKEND", "reference")
    assert resolve("sample", None, "cpu") == "reference"
    assert resolve("sample", "cpu", "cpu") == "cpu"


def test_unknown_names_are_value_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'gpu'"):
        draw(backend="gpu")
    monkeypatch.setenv("MEZO_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"MEZO_KERNELS_BACKEND must be one of .* got 'fast'"):
        draw()


def test_a_named_backend_never_falls_back(monkeypatch):
    unusable = [name for name, reason in mk.backends().items() if reason is not None]
    for name in unusable:
        with pytest.raises(RuntimeError, match=f"backend='{name}' is not usable here: "):
            draw(backend=name)
        monkeypatch.setenv("MEZO_KERNELS_BACKEND", name)
        with pytest.raises(RuntimeError, match=f"MEZO_KERNELS_BACKEND='{name}' is not usable"):
            draw()
        monkeypatch.delenv("MEZO_KERNELS_BACKEND")


def test_a_backend_rejects_the_wrong_device(native):
    with pytest.raises(RuntimeError, match=r"'cpu' is not usable here: It does not work on cuda"):
        resolve("sample", "cpu", "cuda")


def test_without_the_native_module_the_reference_works_and_says_so_once(no_native, caplog):
    reason = mk.backends()["cpu"]
    assert "not built" in reason
    assert "pip install" in reason
    with caplog.at_level(logging.INFO, logger="mezo_kernels"):
        first, second = draw(), draw()
    assert torch.equal(first, second)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "slow reference backend on cpu" in caplog.text
    with pytest.raises(RuntimeError, match="backend='cpu' is not usable here: The native module"):
        draw(backend="cpu")
