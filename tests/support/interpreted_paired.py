"""Checks of the triton backend of attention and label losses in Triton's interpreter.

Run as a program with TRITON_INTERPRET=1, because triton decides at its import: prints one line of
JSON, {check: null or the traceback}. fp32 and fp16 only: the interpreter gets bf16 wrong.
"""

from __future__ import annotations

from unittest import mock

import torch

import mezo_kernels as mk
from mezo_kernels.attention import triton as attention
from mezo_kernels.attention.triton import work
from mezo_kernels.nll import triton as nll
from tests.support.gates import assert_close_to_reference
from tests.support.interpreted import checks_of, report
from tests.support.shared_prefix import bound, is_twins, random_batch, shuffle_rows, twin_rows
from tests.support.vocabulary import nll_of_shards

DTYPES = (torch.float32, torch.float16)
# Prefixes of none, one, a block's neighbours and two splits of 64; empty rows and groups; a tile of
# several rows and a row of several tiles.
RAGGED = [(0, (3, 1, 4)), (1, (2, 2)), (16, (1,)), (33, (5, 0, 2)), (64, (1, 1)), (65, (2, 2))]
RAGGED += [(130, (20, 3)), (0, (1, 1)), (7, ()), (5, (0,))]
# Rows that are long, which matters in 16 bits: just not, by one token, beside a short one; twins.
LONG = [(0, (64, 64)), (16, (65,)), (70, (3, 70))]
LONG_TWINS = [(64, (33, 33)), (3, (66, 1, 66, 1))]
# GQA groups of 1, 3 and 8; a head dim that is a power of two and two that are not.
SHAPES = [(2, 2, 16, 16), (9, 3, 24, 40), (8, 1, 64, 64)]


def ragged(dtype, shape, groups=RAGGED):
    heads, kv_heads, dim, v_dim = shape
    return random_batch(
        groups, heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim, dtype=dtype, seed=3
    )


def check_attention_against_float64():
    for dtype in DTYPES:
        for shape in SHAPES:
            for soft_cap in (0.0, 2.0) if shape == SHAPES[1] else (0.0,):
                batch, options = ragged(dtype, shape), {"soft_cap": soft_cap, "return_lse": True}
                reference, reference_lse = batch.reference(**options)
                ours, lse = batch.attend(backend="triton", **options)
                same, same_lse = batch.attend(backend="reference", **options)
                assert_close_to_reference(ours, same, reference, bound(batch, reference))
                assert_close_to_reference(
                    lse, same_lse, reference_lse, 2**-24 * 8 * shape[2] ** 0.5
                )


def check_attention_of_long_rows():
    for groups in (LONG, LONG_TWINS):
        batch = ragged(torch.float16, SHAPES[1], groups)
        if groups == LONG_TWINS:
            twin_rows(batch)
        out, reference = batch.attend(backend="triton"), batch.reference()
        same = batch.attend(backend="reference")
        assert_close_to_reference(out, same, reference, bound(batch, reference))
        if groups == LONG_TWINS:
            assert is_twins(batch, out)
        with mock.patch.object(attention, "LONG_ROW", 1000):
            narrow = mk.shared_prefix_attention(
                *batch.tensors, plan=batch.plan(), scale=batch.scale, backend="triton"
            )
        # The group of which no row is long did not notice; the others ran through wide blocks.
        tokens = sum(groups[0][1])
        assert torch.equal(narrow[:tokens], out[:tokens])
        assert not torch.equal(narrow[tokens:], out[tokens:])


def check_attention_prefix_in_parts_and_whole():
    for dtype in DTYPES:
        batch = ragged(dtype, SHAPES[1], [(200, (2, 3)), (64, (1,))])
        parts = batch.attend(backend="triton")
        with split_len(1024):
            whole = batch.attend(backend="triton")
        reference = batch.reference()
        assert not torch.equal(parts, whole)
        for ours in (parts, whole):
            assert float((ours - reference).abs().max()) <= bound(batch, reference)


def check_attention_twins():
    groups = [(90, (3, 3)), (0, (2, 2, 2, 2)), (130, (5, 7, 5, 7)), (10, (1, 1)), (3, (17, 17))]
    for dtype in DTYPES:
        for shape in SHAPES:
            batch = ragged(dtype, shape, groups)
            twin_rows(batch)
            out, lse = batch.attend(backend="triton", return_lse=True)
            assert is_twins(batch, out)
            assert is_twins(batch, lse)


def check_attention_alone_and_in_company():
    for dtype in DTYPES:
        batch = ragged(dtype, SHAPES[1], RAGGED if dtype == torch.float32 else [*RAGGED, *LONG])
        out, plan = batch.attend(backend="triton"), batch.plan()
        for group in range(plan.num_groups):
            rows, slots = plan.group_rows(group), plan.prefix_slots(group)
            tokens = slice(plan.qo_indptr[rows.start], plan.qo_indptr[rows.stop])
            alone = mk.shared_prefix_attention(
                *(tensor[tokens] for tensor in batch.tensors[:3]),
                *batch.tensors[3:],
                qo_indptr=[plan.qo_indptr[r] - tokens.start for r in (*rows, rows.stop)],
                group_indptr=[0, len(rows)],
                kv_indptr=[0, len(slots)],
                kv_indices=slots,
                scale=batch.scale,
                backend="triton",
            )
            assert torch.equal(alone, out[tokens]), group


def check_attention_strides_and_plan():
    batch = ragged(torch.float32, SHAPES[0])
    plan, expected = batch.plan(), batch.attend(backend="triton")
    q, k_suffix, v_suffix, k_cache, v_cache = batch.tensors
    qkv = torch.cat([t.flatten(1) for t in (q, k_suffix, v_suffix)], dim=1)
    batch.tensors[:3] = [p.unflatten(1, (-1, 16)) for p in qkv.split([32, 32, 32], dim=1)]
    batch.tensors[3:] = [c.transpose(0, 1).contiguous().transpose(0, 1) for c in (k_cache, v_cache)]
    out = torch.full_like(expected, torch.nan)
    for _ in range(2):
        batch.attend(backend="triton", plan=plan, out=out)
        assert torch.equal(out, expected)


def check_attention_rows_in_any_order():
    for dtype in DTYPES:
        batch = ragged(dtype, SHAPES[1], [*RAGGED, (200, (2, 3, 2))])
        expected = batch.attend(backend="triton", return_lse=True)
        shuffled, plan, places = shuffle_rows(batch, 5)
        results = shuffled.attend(plan=plan, backend="triton", return_lse=True)
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours[places], theirs)


def nll_inputs(T, V, D, dtype):
    generator = torch.Generator().manual_seed(V)
    hidden = torch.randn(T, D, generator=generator).to(dtype)
    lm_head = (torch.randn(V, D, generator=generator) * 3 / D**0.5).to(dtype)
    bias = torch.randn(V, generator=generator)
    return hidden, lm_head, torch.randint(0, V, (T,), generator=generator), bias


def check_nll_against_float64():
    for dtype in DTYPES:
        # Less than a tile of anything; tails everywhere; shares of several tiles, more than are
        # merged at a time; many rows.
        for T, V, D in ((3, 5, 7), (64, 300, 100), (2, 8950, 8), (65, 300, 100), (130, 600, 9)):
            hidden, lm_head, targets, bias = nll_inputs(T, V, D, dtype)
            for options in ({}, {"soft_cap": 4.0, "logit_scale": 0.7}):
                own = options and {"bias": bias}
                ours = mk.label_nll(hidden, lm_head, targets, backend="triton", **options, **own)
                same = mk.label_nll(hidden, lm_head, targets, backend="reference", **options, **own)
                wide = {name: tensor.double() for name, tensor in own.items()}
                reference = mk.label_nll(
                    hidden.double(),
                    lm_head.double(),
                    targets,
                    backend="reference",
                    **options,
                    **wide,
                )
                limit = 2**-24 * (12 * D**0.5 + 4 * float(reference.abs().max()) + 16)
                assert_close_to_reference(ours, same, reference, limit)


def check_nll_alone_and_in_company():
    for dtype in DTYPES:
        rows = torch.tensor([3, 149])
        # Few rows, then many: on each side of the limit a row's bits are its own.
        for total, parts in ((64, (1, 2, 33)), (140, (65, 100))):
            hidden, lm_head, targets, _ = nll_inputs(total, 150, 70, dtype)
            together = mk.label_nll(hidden, lm_head, targets, backend="triton")
            logits = mk.label_logits(hidden, lm_head, rows, backend="triton")
            for T in parts:
                alone = mk.label_nll(hidden[-T:], lm_head, targets[-T:], backend="triton")
                assert torch.equal(alone, together[-T:]), T
            # Label logits have no limit.
            for T in (1, 33, 64):
                alone = mk.label_logits(hidden[-T:], lm_head, rows, backend="triton")
                assert torch.equal(alone, logits[-T:]), T


def check_nll_shards_and_masked_tokens():
    hidden, lm_head, targets, bias = nll_inputs(20, 300, 32, torch.float32)
    targets[:3] = torch.tensor([0, 129, 299])
    # Whole tiles of masked tokens, at the beginning and in the middle.
    bias[:64] = bias[128:192] = -torch.inf
    bias[0] = bias[129] = 0.0
    whole = mk.label_nll(hidden, lm_head, targets, bias=bias, backend="reference")
    _, merged = nll_of_shards(hidden, lm_head, targets, (129, 200), bias=bias, backend="triton")
    torch.testing.assert_close(merged, whole, rtol=1e-6, atol=1e-5)
    one = mk.label_nll(hidden, lm_head, targets, bias=bias, backend="triton")
    torch.testing.assert_close(one, whole, rtol=1e-6, atol=1e-5)


def check_label_logits():
    for dtype in DTYPES:
        hidden, lm_head, _, bias = nll_inputs(40, 300, 50, dtype)
        rows = torch.randint(0, 300, (19,), generator=torch.Generator().manual_seed(0))
        options = {"bias": bias, "soft_cap": 4.0, "logit_scale": 2.0}
        ours = mk.label_logits(hidden, lm_head, rows, backend="triton", **options)
        same = mk.label_logits(hidden, lm_head, rows, backend="reference", **options)
        options["bias"] = bias.double()
        wide = (hidden.double(), lm_head.double())
        reference = mk.label_logits(*wide, rows, backend="reference", **options)
        assert_close_to_reference(ours, same, reference, 2**-24 * 2 * (12 * 50**0.5 + 16))


class split_len:  # noqa: N801
    """Parts of a prefix of another length, so that small cases have several."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __enter__(self) -> None:
        self.before, work.SPLIT_LEN = work.SPLIT_LEN, self.length

    def __exit__(self, *_: object) -> None:
        work.SPLIT_LEN = self.before


CHECKS = checks_of(globals())


def main() -> None:
    with split_len(64), mock.patch.object(nll, "MAX_SPLITS", 35):
        report(CHECKS)


if __name__ == "__main__":
    main()
