"""The committed bits of z. A failure here is a format break: every stored trajectory changes."""

import importlib.util
import json
from pathlib import Path

import pytest

import mezo_kernels as mk

KAT = Path(__file__).parent / "kat"
GOLDEN = json.loads((KAT / "golden_z.json").read_text())
BROKEN = (
    "the bits of z changed: a format break. Every stored trajectory replays to other weights; "
    "raise the trajectory format version and write a Numerics line in the CHANGELOG"
)


@pytest.fixture(scope="module")
def make_golden():
    """The module that wrote the golden file."""
    spec = importlib.util.spec_from_file_location("make_golden", KAT / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_golden(make_golden, backend):
    # Through JSON, which has no tuples.
    made = json.loads(json.dumps(make_golden.make(backend)))
    for ours, golden in zip(made["entries"], GOLDEN["entries"], strict=True):
        assert ours == golden, BROKEN
    assert made["digests"] == GOLDEN["digests"], BROKEN


def test_reference_gives_the_golden_bits(make_golden):
    assert_golden(make_golden, "reference")


def test_cpu_gives_the_golden_bits(isa, make_golden):
    assert_golden(make_golden, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_backends_give_the_golden_bits(make_golden, backend):
    if mk.backends()[backend] is not None:
        pytest.skip(mk.backends()[backend])
    spec = mk.TensorSpec("digest", make_golden.DIGEST_SHAPE)
    for digest in GOLDEN["digests"]:
        direction = mk.Direction(42, 7, 1, digest["distribution"])
        z = mk.sample(spec, direction, backend=backend, device="cuda").cpu()
        assert make_golden.digest_of(z) == digest["blake2s"], BROKEN


def test_golden_covers_what_it_claims():
    entries = GOLDEN["entries"]
    assert {entry["distribution"] for entry in entries} == {"gaussian", "rademacher"}
    last = max(
        (entry["offset"][0] + entry["shape"][0]) * entry["global_shape"][1] for entry in entries
    )
    assert 2**34 - 2**18 < last < 2**34
    assert sum(len(entry["bits"].split()) for entry in entries) >= 300
