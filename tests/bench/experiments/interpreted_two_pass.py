"""Checks of `bench.experiments.attention.two_pass` in Triton's interpreter, against float64.

Run as a program with TRITON_INTERPRET=1; prints one line of JSON, {check: null or the traceback}.
"""

from __future__ import annotations

import warnings
from unittest import mock

import torch

from bench.experiments.attention.cascade import cascade_of
from tests.support.gates import assert_close_to_reference
from tests.support.interpreted import checks_of, report
from tests.support.shared_prefix import bound, random_batch, shuffle_rows

DTYPES = (torch.float32, torch.float16)
# Prefixes of none, one and of more than SGLang's tile of keys; empty rows, groups without tokens or
# without a prefix in the middle; a row of more than its tile of queries.
RAGGED = [(1, (2, 2)), (0, (3, 1, 4)), (33, (5, 0, 2)), (7, ()), (130, (70, 3)), (5, (0,))]
WITH_PREFIX = [(3, (2, 1)), (40, (1, 4))]
# GQA groups of 1, 3 and 8; head dims that are no power of two.
SHAPES = [(2, 2, 16, 16), (9, 3, 24, 40), (8, 1, 64, 64)]


def make(dtype, shape, groups=RAGGED):
    heads, kv_heads, dim, v_dim = shape
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "v_dim": v_dim}
    return random_batch(groups, **sizes, dtype=dtype, seed=4)


def limit(batch, reference):
    """Two results and their sum are rounded, not one result: two more roundings of the output."""
    return bound(batch, reference) + 2 * torch.finfo(batch.tensors[0].dtype).eps * float(
        reference.abs().max()
    )


def two_pass(batch, plan, **options):
    from bench.experiments.attention.two_pass import two_pass_attention

    return two_pass_attention(*batch.tensors, plan=plan, scale=batch.scale, **options)


def check_against_float64():
    for dtype in DTYPES:
        for shape in SHAPES:
            for soft_cap in (0.0, 2.0) if shape == SHAPES[1] else (0.0,):
                batch, options = make(dtype, shape), {"soft_cap": soft_cap, "return_lse": True}
                reference, reference_lse = batch.reference(**options)
                same, same_lse = batch.attend(backend="reference", **options)
                ours, lse = two_pass(batch, batch.plan(), **options)
                assert_close_to_reference(ours, same, reference, limit(batch, reference))
                assert_close_to_reference(
                    lse, same_lse, reference_lse, 2**-24 * 16 * shape[2] ** 0.5
                )


def check_rows_in_any_order():
    for groups in (RAGGED, WITH_PREFIX):
        batch = make(torch.float32, SHAPES[1], groups)
        reference, reference_lse = batch.reference(return_lse=True)
        shuffled, plan, places = shuffle_rows(batch, 5)
        out = torch.full_like(reference, torch.nan, dtype=torch.float32)
        result, lse = two_pass(shuffled, plan, return_lse=True, out=out)
        assert result is out
        assert float((out[places] - reference).abs().max()) <= limit(batch, reference)
        assert float((lse[places] - reference_lse).abs().max()) <= 2**-24 * 16 * 24**0.5


def check_a_plan_is_read_once():
    batch = make(torch.float32, SHAPES[0], WITH_PREFIX)
    plan = batch.plan()
    first = two_pass(batch, plan)
    assert cascade_of(plan).token_order is None
    out = torch.full_like(first, torch.nan)
    with mock.patch("bench.experiments.attention.two_pass.cascade_of") as read_again:
        assert torch.equal(two_pass(batch, plan, out=out), first)
    assert not read_again.called
    assert torch.equal(out, first)


def check_strides():
    batch = make(torch.float32, SHAPES[0])
    expected = two_pass(batch, batch.plan())
    q, k_suffix, v_suffix, k_cache, v_cache = batch.tensors
    qkv = torch.cat([t.flatten(1) for t in (q, k_suffix, v_suffix)], dim=1)
    batch.tensors[:3] = [p.unflatten(1, (-1, 16)) for p in qkv.split([32, 32, 32], dim=1)]
    batch.tensors[3:] = [c.transpose(0, 1).contiguous().transpose(0, 1) for c in (k_cache, v_cache)]
    assert torch.equal(two_pass(batch, batch.plan()), expected)


def check_no_prefix_and_no_tokens():
    for groups in ([(0, (3, 2)), (0, (1,))], [(4, (0, 0))]):
        batch = make(torch.float32, SHAPES[0], groups)
        ours, lse = two_pass(batch, batch.plan(), return_lse=True)
        reference, reference_lse = batch.reference(return_lse=True)
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), reference_lse, rtol=1e-5, atol=1e-5)


def check_prefix_per_row():
    from bench.experiments.attention.two_pass import prefix_per_row

    for dtype in DTYPES:
        batch = make(dtype, SHAPES[1])
        options = {"soft_cap": 2.0, "return_lse": True}
        reference, reference_lse = batch.reference(**options)
        same, same_lse = batch.attend(backend="reference", **options)
        shuffled, plan, places = shuffle_rows(batch, 6)
        ours, lse = prefix_per_row(*shuffled.tensors, plan=plan, scale=batch.scale, **options)
        assert_close_to_reference(ours[places], same, reference, bound(batch, reference))
        assert_close_to_reference(lse[places], same_lse, reference_lse, 2**-24 * 16 * 24**0.5)


CHECKS = checks_of(globals())


def main() -> None:
    with warnings.catch_warnings():
        # SGLang's imports warn; not our warnings.
        warnings.simplefilter("ignore")
        from mezo.engines.sglang.cpu_host.host import prepare_import

        prepare_import()
        from bench.experiments.attention.two_pass import _kernel, _merge

        _kernel()
        _merge()
    report(CHECKS)


if __name__ == "__main__":
    main()
