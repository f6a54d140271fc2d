"""The forms of a model's layers for CPU hosts against SGLang's own and against float64."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mezo.engines.sglang.batch.cpu_layers import CpuLayers, cpu_layers
from mezo.engines.sglang.cpu_host import host
from tests.support import exact_layers

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="for hosts without an accelerator"),
]

RUNNER = types.SimpleNamespace(device="cpu", dtype=torch.float32)
HEAD_DIM, HEADS, KV_HEADS, HIDDEN, INNER = 32, 6, 2, 192, 320


@pytest.fixture(scope="module")
def sgl() -> Any:
    """SGLang's classes."""
    host.prepare_import()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers import activation, layernorm, rotary_embedding
        from sglang.srt.layers.quantization import unquant
        from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    try:
        activation.SiluAndMul()
    except ValueError:  # 0.5.17 makes no layers before a server's arguments are known
        set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    return types.SimpleNamespace(
        Silu=activation.SiluAndMul,
        Norm=layernorm.RMSNorm,
        Rotary=rotary_embedding.RotaryEmbedding,
        get_rope=rotary_embedding.get_rope,
        Linear=unquant.UnquantizedLinearMethod,
    )


def _norm(kind: Any, **options: Any) -> Any:
    norm = kind(HIDDEN, eps=1e-5, **options)
    norm.weight.data.normal_()
    return norm


def _rope(sgl: Any, *, rotary_dim: int = HEAD_DIM, is_neox: bool = True) -> Any:
    return sgl.get_rope(
        HEAD_DIM, rotary_dim=rotary_dim, max_position=512, base=1e4, is_neox_style=is_neox
    )


def _linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> Any:
    return types.SimpleNamespace(
        weight=torch.randn(INNER, HIDDEN, dtype=dtype),
        bias=torch.randn(INNER, dtype=dtype) if bias else None,
    )


def _qkv(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Positions, queries and keys as they lie in the output of qkv_proj."""
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    q, k, _ = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
    return torch.randint(0, 512, (tokens,)), q, k


@pytest.fixture(params=["linear", "linear without bias", "norm", "norm + residual", "rope", "silu"])
def case(request: Any, sgl: Any) -> Any:
    """(a layer's call on a tuple of `[T, ...]` inputs, a maker of them, the same in float64)."""
    name = request.param
    if name.startswith("linear"):
        layer = _linear(bias=name == "linear")
        method = sgl.Linear()

        def exact(x: torch.Tensor) -> torch.Tensor:
            bias = 0 if layer.bias is None else layer.bias.double()
            return x @ layer.weight.double().T + bias

        return (
            lambda x: method.apply(layer, x, layer.bias),
            lambda tokens: (torch.randn(tokens, HIDDEN),),
            exact,
        )
    if name.startswith("norm"):
        norm = _norm(sgl.Norm)

        def exact_norm(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            total = x if residual is None else x + residual
            normed = exact_layers.rms_norm(total, norm.weight, 1e-5)
            return normed if residual is None else (normed, total)

        size = 1 if name == "norm" else 2
        return norm, lambda tokens: tuple(torch.randn(size, tokens, HIDDEN)), exact_norm
    if name == "rope":
        rope = _rope(sgl)

        def exact_rope(positions: torch.Tensor, *heads: torch.Tensor) -> Any:
            angles = positions[:, None].double() * 1e4 ** (
                -torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM
            )
            return tuple(exact_layers.rotary(x, angles.cos(), angles.sin()) for x in heads)

        return rope, _qkv, exact_rope
    return sgl.Silu(), lambda tokens: (torch.randn(tokens, 2 * INNER),), exact_layers.silu_and_mul


def _outputs(call: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    result = call(*inputs)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("tokens", [1, 2, 7, 96])
def test_as_close_to_float64_as_sglangs_own(case: Any, tokens: int) -> None:
    layer, make, exact = case
    inputs = make(tokens)
    doubles = tuple(x if x.dtype == torch.int64 else x.double() for x in inputs)
    wanted = _outputs(exact, doubles)
    own = _outputs(layer, inputs)
    with cpu_layers(RUNNER):
        ours = _outputs(layer, inputs)
    for got, theirs, want in zip(ours, own, wanted, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == theirs.shape
        scale = want.abs().max()
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-6 * scale


def test_inputs_stay_as_they_are(case: Any) -> None:
    layer, make, _ = case
    inputs = make(5)
    before = [x.clone() for x in inputs]
    with cpu_layers(RUNNER):
        layer(*inputs)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


@pytest.mark.parametrize("tokens", [2, 3, 33, 96])
def test_a_tokens_bits_do_not_depend_on_its_company(case: Any, tokens: int) -> None:
    layer, make, _ = case
    inputs = make(130)
    with cpu_layers(RUNNER):
        whole = _outputs(layer, inputs)
        for start in (0, 1, 130 - tokens):
            part = tuple(x[start : start + tokens] for x in inputs)
            for got, want in zip(_outputs(layer, part), whole, strict=True):
                assert torch.equal(got, want[start : start + tokens])


def test_turns_follow_positions_and_embeddings(sgl: Any) -> None:
    ropes = [_rope(sgl), sgl.get_rope(HEAD_DIM, HEAD_DIM, 512, 5e3, True)]
    batches = [_qkv(4), _qkv(4)]
    with cpu_layers(RUNNER):
        ours = [rope(*batch) for rope in ropes for batch in batches]
    own = [rope(*batch) for rope in ropes for batch in batches]
    for got, want in zip(ours, own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours[0][0], ours[2][0])


def test_the_forms_are_used_and_only_inside(sgl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("linear", "rms_norm", "rotary", "silu_and_mul"):
        form = getattr(CpuLayers, name)

        def counted(*args: Any, name: str = name, form: Any = form, **kwargs: Any) -> Any:
            used.append(name)
            return form(*args, **kwargs)

        monkeypatch.setattr(CpuLayers, name, counted)
    layer = _linear()

    def run() -> None:
        sgl.Linear().apply(layer, torch.randn(3, HIDDEN), None)
        _norm(sgl.Norm)(torch.randn(3, HIDDEN), torch.randn(3, HIDDEN))
        _rope(sgl)(*_qkv(3))
        sgl.Silu()(torch.randn(3, 2 * INNER))

    run()
    assert used == []
    with cpu_layers(RUNNER):
        run()
    assert used == ["linear", "rms_norm", "rotary", "silu_and_mul"]
    with pytest.raises(ValueError, match="weight must be"), cpu_layers(RUNNER):
        _norm(sgl.Norm)(torch.randn(3, HIDDEN + 1))
    used.clear()
    run()
    for other in ({"device": "cuda"}, {"dtype": torch.bfloat16}):
        with cpu_layers(types.SimpleNamespace(**{**vars(RUNNER), **other})):
            run()
    assert used == []


def test_what_they_do_not_cover_is_sglangs_own(sgl: Any) -> None:
    class Shifted(sgl.Norm):  # type: ignore[misc]
        def forward_native(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
            return x + 1.0

    half = torch.bfloat16
    x = torch.randn(3, HIDDEN)
    norm, linear = _norm(sgl.Norm), _linear(half)
    narrow, shifted = _norm(sgl.Norm, var_hidden_size=HIDDEN // 2), _norm(Shifted)
    positions, q, k = _qkv(3)
    calls: list[Callable[[], Any]] = [
        lambda: _outputs(norm, (x, 2 * x, 3 * x)),  # post_residual_addition
        lambda: narrow(x),
        lambda: shifted(x),
        lambda: norm(x.to(half)),
        lambda: sgl.Silu()(torch.ones(3, 2 * INNER, dtype=half)),
        lambda: sgl.Linear().apply(linear, x.to(half)),
        lambda: _rope(sgl, rotary_dim=HEAD_DIM // 2)(positions, q, k),
        lambda: _rope(sgl, is_neox=False)(positions, q, k),
        lambda: _rope(sgl)(positions.int(), q, k),
    ]
    for call in calls:
        own = call()
        with cpu_layers(RUNNER):
            ours = call()
        torch.testing.assert_close(ours, own, rtol=0, atol=0)
