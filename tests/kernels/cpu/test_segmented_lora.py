"""SegmentedLora against float64, its bits over instruction sets, threads and neighbours."""

import itertools
import random

import pytest
import torch

from mezo_kernels.cpu import SegmentedLora


def case(seed, *, rank, depth, widths, lengths, slots, max_rank=None):
    """Random tensors of one stacked module; the buffers' unused parts are NaN."""
    torch.manual_seed(seed)
    slices, max_rank, num_slots = len(widths), max_rank or rank, 1 + max(s or 0 for s in slots)
    a = torch.full((num_slots, slices * max_rank, depth), torch.nan)
    b = torch.full((num_slots, sum(widths), max_rank), torch.nan)
    for slot in {s for s in slots if s is not None}:
        a[slot, : slices * rank] = torch.randn(slices * rank, depth)
        b[slot, :, :rank] = torch.randn(sum(widths), rank)
    indptr = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    scalings = [random.Random(seed).uniform(0.5, 3) for _ in slots]
    offsets = [sum(widths[:i]) for i in range(slices + 1)]
    x, out = torch.randn(indptr[-1], depth), torch.randn(indptr[-1], sum(widths))
    return x, a, b, out, offsets, (indptr, slots, scalings, rank)


def run(x, a, b, out, offsets, segments, backend=None):
    lora, result = SegmentedLora(*segments, backend=backend), out.clone()
    h = lora.shrink(x, a, len(offsets) - 1)
    lora.expand_(result, h, b, offsets)
    return result


def in_float64(x, a, b, out, offsets, segments):
    indptr, slots, scalings, rank = segments
    result = out.double()
    for start, stop, slot, scaling in zip(indptr, indptr[1:], slots, scalings, strict=False):
        if slot is None:
            continue
        for i, (first, last) in enumerate(itertools.pairwise(offsets)):
            factor = a[slot, i * rank : (i + 1) * rank].double()
            h = x[start:stop].double() @ factor.T
            result[start:stop, first:last] += scaling * h @ b[slot, first:last, :rank].double().T
    return result


CASES = {
    "qkv of the demo": {
        "rank": 8,
        "depth": 576,
        "widths": (576, 192, 192),
        "lengths": (48, 48),
        "slots": (2, 3),
    },
    "odd everything": {
        "rank": 5,
        "depth": 77,
        "widths": (33, 70),
        "lengths": (3, 0, 7, 1),
        "slots": (1, 0, 4, 1),
        "max_rank": 9,
    },
    "rows without an adapter": {
        "rank": 3,
        "depth": 16,
        "widths": (64,),
        "lengths": (2, 5, 4),
        "slots": (0, None, 1),
    },
    "a rank of several blocks": {
        "rank": 150,
        "depth": 40,
        "widths": (130,),
        "lengths": (5,),
        "slots": (0,),
    },
    "shorter than a vector": {
        "rank": 1,
        "depth": 3,
        "widths": (2,),
        "lengths": (1, 1),
        "slots": (0, 1),
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_float64(name, backend, native):
    inputs = case(len(name), **CASES[name])
    reference = in_float64(*inputs)
    result = run(*inputs, backend=backend)
    # Results have a spread of scaling * sqrt(depth * rank), scaling up to 3: ulps of that.
    size = (CASES[name]["depth"] * CASES[name]["rank"]) ** 0.5
    torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_instruction_set_or_threads(name, isas, threads, bits):
    inputs = case(3, **CASES[name])
    results = [bits(run(*inputs, backend="cpu")) for _ in isas()]
    torch.set_num_threads(1)
    results.append(bits(run(*inputs, backend="cpu")))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_rows_bits_do_not_depend_on_its_place_or_company(isa, bits):
    x, a, b, out, offsets, (_, _, _, rank) = case(
        5, rank=8, depth=100, widths=(70, 30), lengths=(13,), slots=(1,)
    )
    whole = run(x, a, b, out, offsets, ([0, 13], [1], [2.0], rank), "cpu")
    for row in range(13):
        alone = run(x[row : row + 1], a, b, out[row : row + 1], offsets, ([0, 1], [1], [2.0], rank))
        assert torch.equal(bits(alone), bits(whole[row : row + 1]))


def test_other_dtypes_take_the_reference():
    x, a, b, out, offsets, segments = case(
        6, rank=4, depth=32, widths=(16,), lengths=(6,), slots=(0,)
    )
    half = [t.to(torch.bfloat16) for t in (x, a, b, out)]
    reference = in_float64(*(t.float() for t in half), offsets, segments)
    result = run(*half, offsets, segments)
    torch.testing.assert_close(result.double(), reference, rtol=2e-2, atol=0.2)
    with pytest.raises(ValueError, match="float32 on the CPU"):
        run(*half, offsets, segments, "cpu")


def test_works_without_the_native_module(no_native):
    inputs = case(7, **CASES["odd everything"])
    torch.testing.assert_close(run(*inputs).double(), in_float64(*inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="not usable here"):
        run(*inputs, backend="cpu")


def test_bad_input_gets_a_sentence():
    x, a, b, out, offsets, segments = case(
        8, rank=4, depth=32, widths=(16, 16), lengths=(6,), slots=(1,)
    )
    lora = SegmentedLora(*segments)
    h = lora.shrink(x, a, 2)
    for message, call in {
        "one entry more": lambda: SegmentedLora([0, 1], [0, 1], [1.0], 4),
        "never decrease": lambda: SegmentedLora([0, 2, 1], [0, 1], [1.0, 1.0], 4),
        "slots must be >= 0": lambda: SegmentedLora([0, 1], [-1], [1.0], 4),
        "out must be torch.float32": lambda: lora.expand_(out.double(), h, b, offsets),
        r"stride\(-1\) == 1, got": lambda: lora.expand_(out.T.contiguous().T, h, b, offsets),
        "rank must be >= 1": lambda: SegmentedLora([0, 1], [0], [1.0], 0),
        "must be one of .*reference., .cpu.": lambda: SegmentedLora(
            [0, 1], [0], [1.0], 4, backend="cuda"
        ),
        "as indptr ends": lambda: lora.shrink(x[:3], a, 2),
        r"at least \(2, 12, 32\)": lambda: lora.shrink(x, a, 3),
        "float32, got": lambda: lora.shrink(x, a.double(), 2),
        "contiguous": lambda: lora.shrink(x.T.contiguous().T, a, 2),
        "offsets of the stacked": lambda: lora.expand_(out[:, :20], h, b, offsets),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
