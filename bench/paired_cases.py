"""What `python -m bench.paired` times: the cases, their tensors, their calls in plain torch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import mezo_kernels as mk
from bench.timing import Call
from mezo_kernels.cpu import SegmentedLora

# H, H_kv, D of SmolLM2-135M, the model of the demo.
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
# Copies of a prefix for each row that are still made.
COPIES_LIMIT = 16 << 30
LIGER = "Liger fused linear cross-entropy"
# (D_in, D_out of the stacked modules) of a layer of that model.
MODULES = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))

Calls = dict[str, Call]


@dataclass(frozen=True)
class AttentionCase:
    """Groups of equal rows: prefix lengths drawn from a range, suffixes of one length."""

    prefix: tuple[int, int]
    suffix: int
    num_groups: int = 16
    num_rows: int = 2
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    dim: int = HEAD_DIM

    @property
    def name(self) -> str:
        return f"attention, per layer: {self}"

    @property
    def gqa(self) -> int:
        """Heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def nbytes(self) -> int:
        """16-bit bytes that must move: a prefix per group, the suffix, q, the result."""
        tokens = self.num_groups * self.num_rows * self.suffix
        keys = self.num_groups * self.prefix[0] + tokens
        return 2 * self.dim * (2 * keys * self.kv_heads + 2 * tokens * self.heads)

    @property
    def copies_nbytes(self) -> int:
        """16-bit bytes of keys and values where each row has the prefix for itself."""
        rows = self.num_groups * self.num_rows
        return 4 * self.dim * self.kv_heads * rows * (self.prefix[1] + self.suffix)

    def __str__(self) -> str:
        low, high = self.prefix
        prefix = str(low) if low == high else f"{low}-{high}"
        return (
            f"{self.num_groups} groups x {self.num_rows} rows, prefix {prefix}, "
            f"suffix {self.suffix}, heads {self.heads}/{self.kv_heads} x {self.dim}"
        )


class Attention:
    """The tensors of a case and the calls to compare."""

    def __init__(self, case: AttentionCase, dtype: torch.dtype, device: str) -> None:
        choose = random.Random(str(case))
        lens = [choose.randint(*case.prefix) for _ in range(case.num_groups)]
        num_rows, num_slots = case.num_groups * case.num_rows, sum(lens)
        num_tokens = num_rows * case.suffix
        # Each prefix is a run of slots, as a fresh cache hands them out, the runs in any order.
        runs = list(torch.arange(num_slots).split(lens))
        choose.shuffle(runs)
        slots = torch.cat(runs).to(device)
        ranges = {
            "qo_indptr": [case.suffix * row for row in range(num_rows + 1)],
            "group_indptr": list(range(0, num_rows + 1, case.num_rows)),
            "kv_indptr": [0, *accumulate(len(run) for run in runs)],
        }
        self.make_plan = lambda: mk.SharedPrefixPlan(**ranges, kv_indices=slots)
        self.plan = self.make_plan()
        self.case, self.scale = case, case.dim**-0.5
        self._expected: list[tuple[range, torch.Tensor]] = []

        def normal(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, case.dim, device=device).to(dtype)

        self.q = normal(num_tokens, case.heads)
        self.k_suffix, self.v_suffix = (normal(num_tokens, case.kv_heads) for _ in range(2))
        self.k_cache, self.v_cache = (normal(num_slots, case.kv_heads) for _ in range(2))
        self.out = torch.empty_like(self.q)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k_suffix, self.v_suffix, self.k_cache, self.v_cache

    def ours(self, backend: str | None = None) -> torch.Tensor:
        options = {"plan": self.plan, "scale": self.scale, "out": self.out, "backend": backend}
        return mk.shared_prefix_attention(*self.tensors, **options)

    def ours_with_new_plan(self) -> torch.Tensor:
        """What the first layer of a batch costs."""
        self.plan = self.make_plan()
        return self.ours()

    def rows(self) -> list[tuple[torch.Tensor, range]]:
        """(slots of the prefix, own tokens) of each row."""
        plan = self.plan
        return [
            (plan.prefix_slots(group), plan.row_tokens(row))
            for group in range(plan.num_groups)
            for row in plan.group_rows(group)
        ]

    def keys_and_values(self, slots: torch.Tensor, own: range) -> tuple[torch.Tensor, torch.Tensor]:
        """`[1, H_kv, P + S, D]` each."""
        mine = slice(own.start, own.stop)
        k = torch.cat((self.k_cache[slots], self.k_suffix[mine]))
        v = torch.cat((self.v_cache[slots], self.v_suffix[mine]))
        return k.movedim(0, 1)[None], v.movedim(0, 1)[None]

    def torch_native(self) -> torch.Tensor:
        """A request at a time, its queries padded to the whole length, as SGLang's torch_native."""
        out = torch.empty_like(self.q)
        for slots, own in self.rows():
            k, v = self.keys_and_values(slots, own)
            q = torch.empty(1, self.case.heads, k.shape[2], self.case.dim, dtype=self.q.dtype)
            q[0, :, len(slots) :] = self.q[own.start : own.stop].movedim(0, 1)
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )
            out[own.start : own.stop] = attended[0, :, len(slots) :].movedim(0, 1)
        return out

    def row_loop(self) -> torch.Tensor:
        """A row at a time, its own queries only."""
        out = torch.empty_like(self.q)
        for slots, own in self.rows():
            k, v = self.keys_and_values(slots, own)
            q = self.q[own.start : own.stop].movedim(0, 1)[None]
            mask = torch.ones(len(own), k.shape[2], dtype=torch.bool).tril(len(slots))
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True
            )
            out[own.start : own.stop] = attended[0].movedim(0, 1)
        return out

    def batched_rows(self) -> Call:
        """All rows in one call over copies of the prefix, where the prefixes are of one length."""
        pairs = [self.keys_and_values(slots, own) for slots, own in self.rows()]
        k, v = (torch.cat(parts).contiguous() for parts in zip(*pairs, strict=True))
        num_rows, length = len(pairs), k.shape[2]
        q = self.q.view(num_rows, -1, *self.q.shape[1:]).transpose(1, 2).contiguous()
        bias = causal_lower_right(q.shape[2], length)
        return lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=self.scale, enable_gqa=True
        ).transpose(1, 2)

    def error(self, result: torch.Tensor) -> float:
        """Relative RMS error against the reference in fp32; on a GPU of the first and last row."""
        if not self._expected:
            rows = self.rows()
            some = rows if self.q.device.type == "cpu" else (rows[0], rows[-1])
            self._expected = [(own, self._row_in_fp32(slots, own)) for slots, own in some]
        result = result.reshape(self.q.shape)
        errors = [result[own.start : own.stop].float() - right for own, right in self._expected]
        squares = sum(float(error.square().mean()) for error in errors)
        norm = sum(float(right.square().mean()) for _, right in self._expected)
        return (squares / norm) ** 0.5

    def _row_in_fp32(self, slots: torch.Tensor, own: range) -> torch.Tensor:
        mine = slice(own.start, own.stop)
        tensors = (self.q[mine], self.k_suffix[mine], self.v_suffix[mine])
        caches = (self.k_cache[slots], self.v_cache[slots])
        return mk.shared_prefix_attention(
            *(tensor.float() for tensor in (*tensors, *caches)),
            qo_indptr=[0, len(own)],
            group_indptr=[0, 1],
            kv_indptr=[0, len(slots)],
            kv_indices=torch.arange(len(slots)),
            scale=self.scale,
            backend="reference",
        )


@dataclass(frozen=True)
class LabelCase:
    """Losses of tokens off their last hidden states."""

    num_tokens: int
    vocab: int = 49152
    dim: int = 576

    @property
    def name(self) -> str:
        return f"label loss: {self}"

    def __str__(self) -> str:
        return f"T {self.num_tokens}, V {self.vocab}, D_in {self.dim}"


def label_calls(case: LabelCase, dtype: torch.dtype, device: str) -> Calls:
    """F.linear and log_softmax, the product only, Liger's fused loss where it is there, ours."""
    num_tokens, vocab, dim = case.num_tokens, case.vocab, case.dim
    hidden = torch.randn(num_tokens, dim, device=device).to(dtype)
    lm_head = (torch.randn(vocab, dim, device=device) * 3 / dim**0.5).to(dtype)
    targets = torch.randint(0, vocab, (num_tokens,), device=device)

    def baseline() -> torch.Tensor:
        logits = F.linear(hidden, lm_head).float()
        return F.cross_entropy(logits, targets, reduction="none")

    calls: Calls = {
        "linear + log_softmax": baseline,
        "linear only": lambda: F.linear(hidden, lm_head),
    }
    if device != "cpu":
        calls[LIGER] = lambda: liger_nll(hidden, lm_head, targets)
    return calls | {"label_nll": lambda: mk.label_nll(hidden, lm_head, targets)}


@torch.no_grad()
def liger_nll(hidden: torch.Tensor, lm_head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses of tokens; its forward makes gradients too, in 0.8.5 only for what asks for them."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, lm_head, targets, reduction="none")


@dataclass(frozen=True)
class LoraCase:
    """All linear modules of a layer of SmolLM2-135M for the two adapters of a pair."""

    num_tokens: int
    rank: int = 8

    @property
    def name(self) -> str:
        return f"LoRA of a pair: {self}"

    def __str__(self) -> str:
        return f"T {self.num_tokens}, r {self.rank}, the modules of a layer"


class PairLora:
    """The tensors of a case, and two ways through them."""

    def __init__(self, case: LoraCase) -> None:
        num_tokens, self.rank = case.num_tokens, case.rank
        self.segments = [0, num_tokens // 2, num_tokens]
        self.lora = SegmentedLora(self.segments, [2, 3], [2.0, 2.0], self.rank)
        self.modules = []
        for depth, widths in MODULES:
            offsets = [sum(widths[:i]) for i in range(len(widths) + 1)]
            shapes = ((4, len(widths) * self.rank, depth), (4, offsets[-1], self.rank))
            a, b = (torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)
            x, base = torch.randn(num_tokens, depth), torch.randn(num_tokens, offsets[-1])
            self.modules.append((x, a, b, base, offsets))

    def loop(self) -> list[torch.Tensor]:
        """Each adapter and each stacked module apart, as SGLang's torch_native backend."""
        for x, a, b, out, offsets in self.modules:
            for slot, (start, stop) in zip((2, 3), pairwise(self.segments), strict=True):
                h = 2.0 * (x[start:stop] @ a[slot].T)
                for i, (first, last) in enumerate(pairwise(offsets)):
                    own = h[:, i * self.rank : (i + 1) * self.rank]
                    out[start:stop, first:last].addmm_(own, b[slot, first:last].T)
        return [module[3] for module in self.modules]

    def ours(self) -> list[torch.Tensor]:
        for x, a, b, out, offsets in self.modules:
            self.lora.expand_(out, self.lora.shrink(x, a, len(offsets) - 1), b, offsets)
        return [module[3] for module in self.modules]

    def added(self, call: Call) -> torch.Tensor:
        """What a call adds to the outputs, which are then as before."""
        before = [module[3].clone() for module in self.modules]
        call()
        parts = [module[3] - old for module, old in zip(self.modules, before, strict=True)]
        for module, old in zip(self.modules, before, strict=True):
            module[3].copy_(old)
        return torch.cat(parts, dim=1)


def cpu_cases() -> list[AttentionCase | LabelCase | LoraCase]:
    """The demo's shapes; LoRA for the tokens of its activated and exact steps."""
    prefixes = ((20, 80), (200, 400), (20, 400))
    return [
        *(AttentionCase(prefix, suffix) for prefix, suffix in product(prefixes, (1, 3, 8))),
        *map(LabelCase, (32, 96, 512)),
        *map(LoraCase, (96, 832)),
    ]


def gpu_cases(*, quick: bool = False) -> list[AttentionCase | LabelCase]:
    labels = [LabelCase(tokens, 131072, 4096) for tokens in (32, 512, 4096)]
    return [*labels, *gpu_attention(quick=quick)]


def gpu_attention(*, quick: bool = False) -> list[AttentionCase]:
    """The cases of a GPU: first a dozen that show the shape of it, then the rest of the grid."""
    grid = [
        AttentionCase((prefix, prefix), suffix, 8, num_rows, heads, 8, 128)
        for prefix, suffix, num_rows, heads in product(
            (256, 2048, 8192, 32768), (1, 8, 32, 128), (2, 8, 32), (8, 32, 64)
        )
    ]
    first = [case for case in grid if is_quick(case)]
    return first if quick else [*first, *(case for case in grid if not is_quick(case))]


def is_quick(case: AttentionCase) -> bool:
    return (
        case.prefix[0] in (256, 2048, 8192)
        and case.suffix in (1, 32)
        and case.num_rows in (2, 32)
        and case.gqa == 4
    )
