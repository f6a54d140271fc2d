"""Which prefill graphs an engine captures, and that SGLang has the arguments for it."""

from __future__ import annotations

import random

import pytest

import mezo
from mezo.engines.sglang import launch
from mezo.engines.sglang.cpu_host.host import prepare_import
from mezo.engines.sglang.eras import ERA
from mezo.engines.sglang.graphs import (
    checked_step_tokens,
    default_step_tokens,
    graph_arguments,
    graph_sizes,
    has_breakable_graphs,
)

CONFIG = mezo.MeZOConfig()

prepare_import()


def replayed(tokens, sizes):
    """The graph that SGLang replays for a batch, or None."""
    size = min((size for size in sizes if size >= tokens), default=None)
    return size if size is not None and size <= 2 * tokens else None


@pytest.mark.parametrize(
    ("step_tokens", "sizes"),
    [
        ([96], [96]),
        ([1096], [1096]),
        ([93], [96]),
        ([90, 130], [136]),
        ([130, 60], [72, 136]),
        ([96, 1096], [144, 280, 552, 1096]),
        ([1], [8]),
    ],
)
def test_sizes_of_a_step(step_tokens, sizes):
    assert graph_sizes(step_tokens, 16384) == sizes


def test_no_step_is_filled_up_to_more_than_twice_its_tokens():
    rng = random.Random(0)
    for _ in range(300):
        least, most = sorted(rng.randrange(8, 5000) for _ in range(2))
        limit = rng.choice((16384, 1000))
        sizes = graph_sizes([most, least], limit)
        assert sizes == sorted(set(sizes))
        assert all(size % 8 == 0 for size in sizes)
        for tokens in range(least, min(most, limit) + 1):
            assert replayed(tokens, sizes)
        assert replayed(min(most, limit), sizes) - min(most, limit) < 8
        # About one for each halving, so a few.
        assert len(sizes) <= 2 or sizes[-1] <= 8 + least * 2 ** len(sizes)


def test_where_steps_are_not_known_there_are_few_sizes_up_to_512_tokens():
    assert graph_arguments({}, CONFIG, None) == {"cuda_graph_bs_prefill": [32, 64, 128, 256, 512]}
    many = mezo.MeZOConfig(num_directions=100)
    sizes = graph_arguments({}, many, None)["cuda_graph_bs_prefill"]
    least, most = default_step_tokens(many)
    assert (least, most) == (200, 1600)  # a token, and eight, of a row under every copy
    assert sizes == [400, 800, 1600]
    small = graph_arguments({"max_prefill_tokens": 300}, CONFIG, None)["cuda_graph_bs_prefill"]
    assert small == [24, 40, 80, 152, 300]


@pytest.mark.parametrize(
    "said",
    [
        {"cuda_graph_bs_prefill": [40]},
        {"cuda_graph_max_bs_prefill": 256},
        {"disable_cuda_graph": True},
        {"disable_prefill_cuda_graph": True},
        {"cuda_graph_backend_prefill": "disabled"},
        {"cuda_graph_config": {"prefill": {"backend": "disabled"}}},
        {"cuda_graph_config": {"prefill": {"bs": [8]}}},
    ],
)
def test_what_a_user_says_about_graphs_stays(said):
    assert graph_arguments(said, CONFIG, (96,)) == {}


@pytest.mark.parametrize(
    "said",
    [
        {"cuda_graph_backend_prefill": "breakable", "lora_backend": "csgmv"},
        {"cuda_graph_backend_decode": "disabled"},
        {"disable_decode_cuda_graph": True},
        {"cuda_graph_config": {"decode": {"backend": "full", "bs": [8]}}},
    ],
)
def test_the_rest_leaves_the_sizes_to_us(said):
    assert graph_arguments(said, CONFIG, (96,)) == {"cuda_graph_bs_prefill": [96]}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cuda_graph_backend_prefill": "full"}, "cuda_graph_backend_prefill must be 'breakable'"),
        ({"cuda_graph_config": {"prefill": {"backend": "tc_piecewise"}}}, "got 'tc_piecewise'"),
        (
            {"cuda_graph_backend_prefill": "breakable", "lora_backend": "torch_native"},
            "lora_backend must be one that SGLang can capture",
        ),
    ],
)
def test_graphs_that_steps_cannot_replay_are_refused(said, message):
    with pytest.raises(NotImplementedError, match=message):
        graph_arguments(said, CONFIG, None)


def test_tokens_of_steps_are_numbers():
    assert checked_step_tokens(None) is None
    assert checked_step_tokens(96) == (96,)
    assert checked_step_tokens([96, 1096]) == (96, 1096)
    for wrong in (0, -3, 1.5, "96", [], [96, 0], True):
        with pytest.raises(ValueError, match="step_tokens must be an integer >= 1"):
            checked_step_tokens(wrong)


@pytest.mark.sglang
def test_sglang_takes_the_arguments(tiny_model_dir, no_engine_noise):
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import ServerArgs

    sizes = graph_arguments({}, CONFIG, (96, 300))
    names = set(ERA.argument_names(ServerArgs))
    said = {"cuda_graph_max_bs_prefill", "disable_cuda_graph", "disable_prefill_cuda_graph"}
    said |= {"cuda_graph_backend_prefill", "cuda_graph_backend_decode", "cuda_graph_config"}
    assert names >= {*sizes, *said}
    args = ServerArgs(
        model_path=tiny_model_dir("llama"), **launch._CPU_ARGS, max_total_tokens=1024, **sizes
    )
    if ERA.resolution == "resolve_once":
        args.resolve_once()
    graphs = args.cuda_graph_config or resolved_view(args).cuda_graph_config
    assert graphs.prefill.bs == [152, 304]
    # What the kind of a graph is called is compared with these names.
    parsed = type(graphs).from_dict({"prefill": {"backend": "breakable", "bs": [96]}})
    assert graph_arguments({"cuda_graph_config": parsed}, CONFIG, None) == {}


@pytest.mark.sglang
@pytest.mark.parametrize("config", [CONFIG, None])
def test_an_engine_for_a_run_is_started_with_them(tiny_model_dir, monkeypatch, config):
    started = []
    monkeypatch.setattr(launch, "_start", lambda _, args: started.append(args))
    model_dir, known = tiny_model_dir("llama"), {"step_tokens": [96, 300]}
    mezo.launch_engine(model_dir, config, **known)
    monkeypatch.setattr(launch, "has_breakable_graphs", lambda args: True)
    mezo.launch_engine(model_dir, config, **known)
    mezo.launch_engine(model_dir, config, **known, cuda_graph_bs_prefill=[40])
    sizes = [args.get("cuda_graph_bs_prefill") for args in started]
    # On a CPU host nothing; an engine without a run may be for serving only.
    assert sizes == [None, [152, 304] if config else None, [40]]
    assert not any("step_tokens" in args for args in started)


def test_a_cpu_host_gets_none():
    assert not has_breakable_graphs({"device": "cpu"})
