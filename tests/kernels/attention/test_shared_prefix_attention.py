"""shared_prefix_attention on the CPU: against float64, against SDPA, bit by bit."""

import random

import pytest
import torch
import torch.nn.functional as F

import mezo_kernels as mk
from mezo_kernels.attention.cpu import make_tables
from tests.support.gates import assert_close_to_reference
from tests.support.shared_prefix import (
    Batch,
    bound,
    is_twins,
    random_batch,
    shuffle_rows,
    twin_rows,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", "cpu")
# Groups that differ in prefix, rows and row lengths: none, one, at and next to a tile of keys.
RAGGED = [
    (0, (3, 1, 4)),
    (1, (2, 2)),
    (63, (1,)),
    (65, (5, 0, 2)),
    (64, (1, 1)),
    (100, (2, 2)),
    (0, (1, 1)),
    (250, (3, 3)),
    (7, ()),
    (5, (0,)),
]


pytestmark = pytest.mark.usefixtures("native", "one_thread")


def test_reference_is_the_attention_of_torch():
    batch = random_batch(RAGGED, heads=6, kv_heads=3, dim=16, v_dim=8, dtype=torch.float64)
    q, k_suffix, v_suffix, k_cache, v_cache = batch.tensors
    ours, plan = batch.attend(backend="reference"), batch.plan()
    for group in range(plan.num_groups):
        slots = plan.prefix_slots(group)
        for row in plan.group_rows(group):
            own = plan.row_tokens(row)
            for i, token in enumerate(own):
                seen = slice(own.start, own.start + i + 1)
                k = torch.cat((k_cache[slots], k_suffix[seen])).transpose(0, 1)
                v = torch.cat((v_cache[slots], v_suffix[seen])).transpose(0, 1)
                expected = F.scaled_dot_product_attention(
                    q[token, :, None], k, v, enable_gqa=True, scale=batch.scale
                )
                torch.testing.assert_close(ours[token], expected[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The head dims SGLang's models have; H / H_kv of 1, 3 (SmolLM2) and 8.
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 1)])
def test_cpu_against_float64(heads, kv_heads, dim, dtype):
    batch = random_batch(RAGGED, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    reference, reference_lse = batch.reference(return_lse=True)
    ours, lse = batch.attend(backend="cpu", return_lse=True)
    same, same_lse = batch.attend(backend="reference", return_lse=True)
    assert ours.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close_to_reference(ours, same, reference, bound(batch, reference))
    assert_close_to_reference(lse, same_lse, reference_lse, 2**-24 * 8 * dim**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_cap_and_value_dim(backend):
    batch = random_batch(RAGGED, dim=48, v_dim=24)
    # Scores of size 3 under a cap of 2: far from linear.
    options = {"scale": 3 * batch.scale, "soft_cap": 2.0}
    reference = batch.reference(**options)
    ours = batch.attend(backend=backend, **options)
    same = batch.attend(backend="reference", **options)
    assert_close_to_reference(ours, same, reference, 3 * bound(batch, reference))
    assert not torch.allclose(ours, batch.attend(backend=backend, scale=3 * batch.scale))


def random_groups(choose: random.Random, *, is_twin: bool) -> list:
    groups = []
    for _ in range(choose.randint(1, 6)):
        rows = [choose.randint(1, 6) for _ in range(choose.randint(1, 4))]
        prefix_len = choose.choice([0, choose.randint(1, 40), choose.randint(1, 700)])
        groups.append((prefix_len, rows * 2 if is_twin else rows))
    return groups


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plus_and_minus_of_one_content_have_the_same_bits(dtype, threads):
    choose = random.Random(f"twins {dtype}")
    for seed in range(60 if threads == 1 else 10):
        heads, kv_heads = choose.choice([(2, 2), (9, 3), (8, 1), (14, 2)])
        batch = random_batch(
            random_groups(choose, is_twin=True),
            heads=heads,
            kv_heads=kv_heads,
            dim=choose.choice([16, 64, 80, 128]),
            dtype=dtype,
            seed=seed,
        )
        twin_rows(batch)
        out, lse = batch.attend(backend="cpu", return_lse=True, soft_cap=choose.choice([0.0, 3.0]))
        assert is_twins(batch, out), seed
        assert is_twins(batch, lse), seed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_does_not_depend_on_its_company(dtype, threads):
    choose = random.Random(f"company {dtype}")
    for seed in range(30 if threads == 1 else 5):
        groups = random_groups(choose, is_twin=False) + [(90, (3, 3))] * 2
        heads, kv_heads = choose.choice([(2, 2), (9, 3), (8, 1)])
        batch = random_batch(groups, heads=heads, kv_heads=kv_heads, dim=64, dtype=dtype, seed=seed)
        out, lse = batch.attend(backend="cpu", return_lse=True)
        plan = batch.plan()
        for group in range(len(groups)):
            rows = plan.group_rows(group)
            tokens = slice(plan.qo_indptr[rows.start], plan.qo_indptr[rows.stop])
            alone = mk.shared_prefix_attention(
                *(tensor[tokens] for tensor in batch.tensors[:3]),
                *batch.tensors[3:],
                qo_indptr=[plan.qo_indptr[r] - tokens.start for r in (*rows, rows.stop)],
                group_indptr=[0, len(rows)],
                kv_indptr=[0, len(plan.prefix_slots(group))],
                kv_indices=plan.prefix_slots(group),
                scale=batch.scale,
                return_lse=True,
                backend="cpu",
            )
            assert torch.equal(alone[0], out[tokens]), (seed, groups[group])
            assert torch.equal(alone[1], lse[tokens]), (seed, groups[group])


def random_case(choose: random.Random, seed: int, **options) -> Batch:
    """Heads that fill no block, one, or several; head dims that fill no vector; a group of each."""
    heads, kv_heads = choose.choice([(2, 2), (9, 3), (14, 2), (50, 1)])
    groups = [*random_groups(choose, is_twin=False), (choose.randint(60, 70), (1, 70))]
    shape = {"dim": choose.choice([1, 7, 16, 64, 66, 80]), "v_dim": choose.choice([3, 16, 64, 72])}
    return random_batch(groups, heads=heads, kv_heads=kv_heads, seed=seed, **(shape | options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_instruction_set_or_threads(dtype, isas, bits):
    choose = random.Random(f"isa {dtype}")
    for seed in range(10):
        batch = random_case(choose, seed, dtype=dtype)
        options = {"return_lse": True, "soft_cap": choose.choice([0.0, 3.0]), "backend": "cpu"}
        results = []
        for _ in isas():
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append([bits(result) for result in batch.attend(**options)])
        for result in results:
            assert all(map(torch.equal, result, results[0])), seed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_company(dtype, isa, bits):
    """A row without other rows has the bits that it has in its group and batch."""
    choose = random.Random(f"row {dtype} {isa}")
    for seed in range(2 if isa == "portable" else 10):
        batch = random_case(choose, seed, dtype=dtype)
        out, lse = (bits(result) for result in batch.attend(backend="cpu", return_lse=True))
        plan = batch.plan()
        for group in range(plan.num_groups):
            for row in plan.group_rows(group):
                own = slice(plan.qo_indptr[row], plan.qo_indptr[row + 1])
                results = mk.shared_prefix_attention(
                    *(tensor[own] for tensor in batch.tensors[:3]),
                    *batch.tensors[3:],
                    qo_indptr=[0, own.stop - own.start],
                    group_indptr=[0, 1],
                    kv_indptr=[0, len(plan.prefix_slots(group))],
                    kv_indices=plan.prefix_slots(group),
                    scale=batch.scale,
                    return_lse=True,
                    backend="cpu",
                )
                for ours, theirs in zip(results, (out, lse), strict=True):
                    assert torch.equal(bits(ours), theirs[own]), (seed, group, row)


def test_random_cases_against_float64(isa):
    choose = random.Random(f"float64 {isa}")
    for seed in range(3 if isa == "portable" else 15):
        batch = random_case(choose, seed, dtype=choose.choice(DTYPES))
        options = {"return_lse": True, "soft_cap": choose.choice([0.0, 3.0])}
        reference, reference_lse = batch.reference(**options)
        ours, lse = batch.attend(backend="cpu", **options)
        assert_close_to_reference(ours, None, reference, 3 * bound(batch, reference))
        assert_close_to_reference(lse, None, reference_lse, 2**-24 * 128)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_fp32_between_two_roundings(dtype, isa):
    batch = random_batch(RAGGED, dim=40, v_dim=24, dtype=dtype)
    ours, lse = batch.attend(backend="cpu", return_lse=True)
    wide, wide_lse = batch.to(torch.float32).attend(backend="cpu", return_lse=True)
    assert torch.equal(ours, wide.to(dtype))
    assert torch.equal(lse, wide_lse)


def test_a_long_prefix(isa):
    prefix_len = 2000 if isa == "portable" else 32768
    batch = random_batch([(prefix_len, (2, 1)), (prefix_len - 1, (1,))], heads=3, kv_heads=1)
    ours, lse = batch.attend(backend="cpu", return_lse=True)
    same = batch.attend(backend="reference")
    reference, reference_lse = batch.reference(return_lse=True)
    assert_close_to_reference(ours, same, reference, bound(batch, reference))
    torch.testing.assert_close(lse.double(), reference_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["prefix", "own", "slot", "scale"])
def test_the_gates_see_a_planted_error(what):
    batch = random_batch([(130, (3, 2)), (64, (70,))], dim=64)
    reference, same = batch.reference(), batch.attend(backend="reference")
    assert_close_to_reference(batch.attend(backend="cpu"), same, reference, bound(batch, reference))
    plan, options = batch.plan(), {}
    tables = make_tables(plan, 2)  # those of the plan itself
    if what == "prefix":  # the last key of the last tile is left out
        tables.blocks[0, 1] -= 1
    elif what == "own":  # a row begins with its neighbour's last token
        tables.rows[1, 0] -= 1
    elif what == "slot":  # a key and a value of another group
        tables.slots[100] = tables.slots[150]
    else:
        options["scale"] = batch.scale * (1 + 2**-12)
    wrong = batch.attend(plan=plan, backend="cpu", **options)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(wrong, same, reference, bound(batch, reference))


def test_nan_stays_where_it_is_seen(isa):
    groups = [(70, (20, 20)), (5, (3,))]
    batch = random_batch(groups, dim=64)
    expected, expected_lse = batch.attend(backend="cpu", return_lse=True)
    # In a token's key, and in another one's value: later tokens of its row see it, in its KV head.
    for tensor, token, kv_head in ((1, 18, 1), (2, 25, 0)):
        batch.tensors[tensor][token, kv_head, 0] = torch.nan
    out, lse = batch.attend(backend="cpu", return_lse=True)
    is_nan = torch.zeros(out.shape, dtype=torch.bool)
    is_nan[18:20, 2:] = True
    is_nan[25:40, :2, 0] = True
    assert torch.equal(out.isnan(), is_nan)
    assert torch.equal(out[~is_nan], expected[~is_nan])
    assert lse[18:20, 2:].isnan().all()
    assert torch.equal(lse[:18], expected_lse[:18])


def test_scores_of_minus_infinity_are_the_empty_state(isa):
    batch = random_batch([(70, (2,)), (0, (1,))])
    batch.tensors[0][...] = 1.0
    for keys in batch.tensors[1::2]:
        keys.nan_to_num_(0.0).fill_(-torch.inf)
    out, lse = batch.attend(backend="cpu", return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_of_a_group_may_stand_anywhere(backend):
    for seed in range(5):
        batch = random_batch([*RAGGED, (70, (2, 3, 2))], dim=64, seed=seed)
        expected = batch.attend(backend=backend, return_lse=True)
        shuffled, plan, places = shuffle_rows(batch, seed)
        assert list(plan.row_order) != list(range(plan.num_rows))
        results = shuffled.attend(plan=plan, backend=backend, return_lse=True)
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours[places], theirs)


def test_a_row_order_that_is_none_raises():
    batch = random_batch(RAGGED)
    for order in ([0, 0, *range(2, 50)], [1, 0]):
        with pytest.raises(ValueError, match="row_order must hold every row"):
            mk.SharedPrefixPlan(**batch.ranges, row_order=order)


def test_two_runs_have_the_same_bits():
    batch = random_batch(RAGGED, dim=64)
    assert torch.equal(batch.attend(backend="cpu"), batch.attend(backend="cpu"))


def test_a_plan_serves_layers_of_different_heads():
    # One plan, as for a model whose layers differ in KV heads.
    batch = random_batch(RAGGED, heads=4, kv_heads=2)
    other = random_batch(RAGGED, heads=4, kv_heads=4)
    plan = batch.plan()
    for one in (batch, other, batch):
        assert torch.equal(one.attend(backend="cpu"), one.attend(plan=plan, backend="cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tensors(backend):
    batch = random_batch(RAGGED, heads=4, kv_heads=2)
    expected = batch.attend(backend=backend)
    q, k_suffix, v_suffix, k_cache, v_cache = batch.tensors
    # Views of one projection's output, and of a pool with heads before slots.
    qkv = torch.cat((q.flatten(1), k_suffix.flatten(1), v_suffix.flatten(1)), dim=1)
    parts = qkv.split([q[0].numel(), k_suffix[0].numel(), v_suffix[0].numel()], dim=1)
    batch.tensors[:3] = [p.unflatten(1, (-1, 16)) for p in parts]
    batch.tensors[3:] = [c.transpose(0, 1).contiguous().transpose(0, 1) for c in (k_cache, v_cache)]
    assert not any(tensor.is_contiguous() for tensor in batch.tensors)
    assert torch.equal(batch.attend(backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_of_out_is_written_and_nothing_else_changes(backend):
    batch = random_batch(RAGGED)
    before = [tensor.clone() for tensor in batch.tensors]
    expected = batch.attend(backend=backend)
    out = torch.full_like(expected, torch.nan)
    assert batch.attend(backend=backend, out=out) is out
    assert torch.equal(out, expected)
    for tensor, copy in zip(batch.tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    batch = random_batch([])
    assert batch.attend(backend=backend).shape == (0, 4, 16)
    batch = random_batch([(5, (0, 0))])
    out, lse = batch.attend(backend=backend, return_lse=True)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite(backend):
    batch = random_batch(RAGGED)
    batch.tensors[0] *= 1e3
    ours, reference = batch.attend(backend=backend), batch.reference()
    assert float((ours - reference).abs().max()) < 1e-3
