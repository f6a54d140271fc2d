"""Negative log-likelihood of labels from hidden states, without a row of logits in memory."""

from collections.abc import Callable
from typing import Protocol, cast

import torch

from mezo_kernels.backends import CPU_TORCH, REFERENCE, TRITON, load, register, resolve
from mezo_kernels.nll.logits import LogitsRule

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

register(
    "label_nll",
    "label_logits",
    needs={"reference": REFERENCE, "cpu": CPU_TORCH, "triton": TRITON},
    package=__name__,
)


class _Backend(Protocol):
    def label_nll_parts(
        self,
        hidden: torch.Tensor,
        lm_head: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        rule: LogitsRule,
        vocab_start: int,
    ) -> Parts: ...

    def label_logits(
        self,
        hidden: torch.Tensor,
        lm_head: torch.Tensor,
        bias: torch.Tensor | None,
        rule: LogitsRule,
    ) -> torch.Tensor: ...


def label_nll(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    logit_scale: float = 1.0,
    vocab_start: int = 0,
    all_gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute the negative log-likelihood of one token per row, without `[T, V]` logits.

        x[t, v] = cap(logit_scale * (hidden[t] . lm_head[v] + bias[v]))
        nll[t]  = log sum_v exp(x[t, v]) - x[t, targets[t]],  cap(x) = soft_cap tanh(x / soft_cap)

    Args:
        hidden: `[T, D_in]` fp32 | fp16 | bf16, the final hidden states at the loss positions, after
            the last norm.
        lm_head: `[V, D_in]`, dtype and device of ``hidden``, last dim contiguous; a vocabulary
            shard where the vocabulary is split. Cut the rows that pad the vocabulary away before.
        targets: `[T]` int64, token ids of the whole vocabulary.
        bias: `[V]` or None, of the rows of ``lm_head``.
        soft_cap: the model's cap on final logits; 0 is none.
        logit_scale: the model's factor on the logits.
        vocab_start: token id of row 0 of ``lm_head``.
        all_gather: where ranks share the vocabulary: gets this shard's parts, `[3, T]`, and
            returns those of all shards, `[shards, 3, T]`, in one order on every rank. The parts are
            the largest logit of the shard, the sum of exp(logit - largest), and the target's logit,
            -inf where the shard lacks it; fp32.
        backend: "reference" | "cpu" | "triton" | None (the best one for the device).

    Returns:
        `[T]` fp32, nats; inf where the target is not among the rows of ``lm_head``, of any shard.

    Raises:
        ValueError: a wrong rank, shape, dtype, stride or device, a negative soft cap, an
            ``all_gather`` that returns another shape, or an unknown backend name.
        NotImplementedError: backend "cuda", which this operation does not have.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: products accumulated and everything after them in fp32 (the reference multiplies in
    the dtype of the inputs, fp64 too, and returns fp64 for it). Deterministic. V, D_in and dtype
    fix the tiles and their order, and in triton for 16-bit dtypes whether T is above 64: on each
    side of that a row's result does not depend on the rows beside it. A plus and a minus row of one
    content are in one call, so they get the same bits whatever T is. Triton holds this by
    construction; cpu fills the rows to a multiple of 32 and relies on BLAS to compute a row alike
    in products of 32 to 512 rows, which the tests check. Backends agree within rounding, not in
    bits. Shards are merged in the order given, so all ranks get the same bits.
    Graph-safe: triton yes (it allocates its output and three floats per row and split); cpu no.
    Cost: lm_head is read once (per 64 or, of many rows, 128 rows in triton, mostly from L2); memory
    T * 1024 floats on the CPU, T * 3 * 264 on a GPU.
    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867) for the running log-sum-exp.

    Example:
        >>> hidden, lm_head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> label_nll(hidden, lm_head, torch.tensor([0, 2]))
        tensor([0.4076, 0.8620])
    """
    function = "label_nll"
    name = resolve(function, backend, hidden.device.type)
    _check(function, hidden, lm_head, bias, soft_cap, name)
    _check_targets(function, hidden, targets)
    rule = LogitsRule(float(logit_scale), float(soft_cap))
    parts = _backend_of(name).label_nll_parts(hidden, lm_head, targets, bias, rule, vocab_start)
    if all_gather is None:
        return _merged([parts])
    shards = all_gather(torch.stack(parts))
    if shards.dim() != 3 or not len(shards) or shards.shape[1:] != (3, len(hidden)):
        raise ValueError(
            f"{function}: all_gather must return [shards, 3, T], with T {len(hidden)}, got "
            f"{tuple(shards.shape)}; gather along a new first dim."
        )
    return _merged([(maximum, total, logit) for maximum, total, logit in shards])


def label_logits(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    label_rows: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute the logits of a few tokens only, for options of one token.

        x[t, l] = cap(logit_scale * (hidden[t] . lm_head[label_rows[l]] + bias[label_rows[l]]))

    The normaliser over the whole vocabulary cancels between the options of one position, so
    `log_softmax(x, 1)` is the classification loss over options of one token.

    Args:
        hidden: `[T, D_in]` fp32 | fp16 | bf16, the final hidden states, after the last norm.
        lm_head: `[V, D_in]`, dtype and device of ``hidden``, last dim contiguous.
        label_rows: `[L]` int64, rows of ``lm_head``.
        bias: `[V]` or None, of the rows of ``lm_head``.
        soft_cap: the model's cap on final logits; 0 is none.
        logit_scale: the model's factor on the logits.
        backend: "reference" | "cpu" | "triton" | None (the best one for the device).

    Returns:
        `[T, L]` fp32; the caller owns it.

    Raises:
        ValueError: a wrong rank, shape, dtype, stride or device, a negative soft cap, or an unknown
            backend name.
        IndexError: a label row outside ``lm_head``; on a GPU torch's own device-side assertion.
        NotImplementedError: backend "cuda", which this operation does not have.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: as `label_nll`: fp32 accumulation, a row's result does not depend on the other rows.
    Graph-safe: triton yes; cpu no. Cost: L rows of lm_head are read, nothing of the others.
    Source: Malladi et al. 2023 (arXiv 2305.17333) for the loss over options.

    Example:
        >>> hidden, lm_head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> label_logits(hidden, lm_head, torch.tensor([0, 2]))
        tensor([[2., 1.],
                [0., 1.]])
    """
    function = "label_logits"
    name = resolve(function, backend, hidden.device.type)
    _check(function, hidden, lm_head, bias, soft_cap, name)
    if label_rows.dtype != torch.int64 or label_rows.dim() != 1:
        raise ValueError(
            f"{function}: label_rows must be [L] torch.int64, got {tuple(label_rows.shape)} "
            f"{label_rows.dtype}; pass one row of lm_head per option."
        )
    rule = LogitsRule(float(logit_scale), float(soft_cap))
    rows = lm_head.index_select(0, label_rows)
    own_bias = None if bias is None else bias.index_select(0, label_rows)
    return _backend_of(name).label_logits(hidden, rows, own_bias, rule)


def _merged(parts: list[Parts]) -> torch.Tensor:
    """The negative log-likelihood, from (max, sum_exp, target_logit) of each shard."""
    maximum, sum_exp, target_logit = parts[0]
    for other_maximum, other_sum_exp, other_logit in parts[1:]:
        merged = torch.maximum(maximum, other_maximum)
        # Two shards of only -inf keep sum 0 instead of NaN.
        shift = merged.clamp(min=torch.finfo(merged.dtype).min)
        sum_exp = sum_exp * (maximum - shift).exp() + other_sum_exp * (other_maximum - shift).exp()
        target_logit = torch.maximum(target_logit, other_logit)
        maximum = merged
    return sum_exp.log() + (maximum - target_logit)


def _backend_of(name: str) -> _Backend:
    return cast(_Backend, load("label_nll", name))


def _check(
    function: str,
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    soft_cap: float,
    backend: str,
) -> None:
    if hidden.dim() != 2 or lm_head.dim() != 2 or hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(
            f"{function}: hidden and lm_head must be [T, D_in] and [V, D_in], got "
            f"{tuple(hidden.shape)} and {tuple(lm_head.shape)}; pass the hidden states at the loss "
            "positions as rows, and the weight as the model stores it."
        )
    dtypes = (*_DTYPES, torch.float64) if backend == "reference" else _DTYPES
    if hidden.dtype not in dtypes or lm_head.dtype != hidden.dtype:
        raise ValueError(
            f"{function}: hidden and lm_head must have one dtype of {[str(d) for d in dtypes]}, "
            f"got {hidden.dtype} and {lm_head.dtype}; convert the hidden states."
        )
    if not len(lm_head) or not lm_head.shape[1]:
        raise ValueError(
            f"{function}: lm_head must have rows and columns, got {tuple(lm_head.shape)}; leave a "
            "rank without a share of the vocabulary out."
        )
    if lm_head.stride(1) != 1 or hidden.stride(1) != 1:
        raise ValueError(
            f"{function}: hidden and lm_head must have stride(-1) == 1, got strides "
            f"{hidden.stride()} and {lm_head.stride()}; pass them row-major."
        )
    if bias is not None and bias.shape != (len(lm_head),):
        raise ValueError(
            f"{function}: bias must be [V] like the rows of lm_head, ({len(lm_head)},), got "
            f"{tuple(bias.shape)}; pass the shard's part of it."
        )
    if soft_cap < 0:
        raise ValueError(f"{function}: soft_cap must be >= 0, got {soft_cap}; pass 0 for no cap.")
    for what, tensor in (("lm_head", lm_head), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{function}: {what} must be on {hidden.device} like hidden, got {tensor.device}; "
                "move it once, before training."
            )


def _check_targets(function: str, hidden: torch.Tensor, targets: torch.Tensor) -> None:
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{function}: targets must be [T] torch.int64, ({len(hidden)},), got "
            f"{tuple(targets.shape)} {targets.dtype}; pass one token id per row of hidden."
        )
    if targets.device != hidden.device:
        raise ValueError(
            f"{function}: targets must be on {hidden.device} like hidden, got {targets.device}; "
            "move them with the batch."
        )
