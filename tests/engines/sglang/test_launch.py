"""`launch_engine`: sizes from checkpoint, config and host; what cannot start is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open

import mezo
from mezo.engines.sglang.cpu_host import host as cpu_host
from mezo.engines.sglang.launch import _cpu_environment, _environment
from mezo.engines.sglang.model_checkpoint import read_checkpoint
from mezo.engines.sglang.server_arguments import check_cpu_args
from mezo.engines.sglang.sizing import check_one_row, cpu_sizes
from tests.support.independent import lora_parameters, peft_model
from tests.support.tiny import LINEARS, save_tiny_model

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="for hosts without an accelerator"),
]

GIB = 2**30
DEFAULT = {"max_running_requests": 128, "max_total_tokens": 32768}
LARGE = {  # Llama 3.1 70B
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}


def directory(tmp_path: Path, config: object, **files: object) -> Path:
    """A checkpoint's directory without weights."""
    target = tmp_path / "model"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, content in files.items():
        (target / f"{name.replace('_index', '.index')}.json").write_text(json.dumps(content))
    return target


def large(tmp_path: Path, total_size: int = 141 * 10**9) -> Path:
    index = {"metadata": {"total_size": total_size}, "weight_map": {}}
    target = directory(tmp_path, LARGE)
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def test_a_checkpoints_sizes_are_those_of_its_tensors(tiny_model_dir):
    for architecture in ("llama", "opt"):
        path = tiny_model_dir(architecture)
        with safe_open(f"{path}/model.safetensors", "pt") as file:
            elements = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        checkpoint = read_checkpoint(path)
        assert checkpoint.weight_bytes(4) == 4 * elements
        assert checkpoint.weight_bytes(2) == 2 * elements
    # 2 layers, 2 KV heads of 16, keys and values.
    assert read_checkpoint(tiny_model_dir("llama")).kv_token_bytes(4) == 2 * 2 * 2 * 16 * 4


def test_an_adapters_size_is_that_of_the_adapter(tiny_model_dir):
    config = mezo.MeZOConfig(rank=4, target_modules=LINEARS)
    model = peft_model(tiny_model_dir("llama"), config)
    elements = sum(p.numel() for p in lora_parameters(model).values())
    checkpoint = read_checkpoint(tiny_model_dir("llama"))
    assert checkpoint.adapter_elements(4, LINEARS) == elements
    # SGLang's pool holds q, k and v together.
    one, three = (checkpoint.adapter_elements(4, m) for m in (["q_proj"], LINEARS[:3]))
    assert one == three


def test_the_default_engine_is_as_large_as_before(tiny_model_dir):
    checkpoint = read_checkpoint(tiny_model_dir("llama"))
    for free in (8 * GIB, 64 * GIB):
        sizes = cpu_sizes(mezo.MeZOConfig(), checkpoint, {"dtype": "float32"}, free)
        fraction = sizes.pop("mem_fraction_static")
        assert sizes == DEFAULT
        assert 0.1 <= fraction <= 0.5
    unknown = cpu_sizes(mezo.MeZOConfig(), None, {"dtype": "float32"}, 8 * GIB)
    assert {name: unknown[name] for name in DEFAULT} == DEFAULT


@pytest.mark.parametrize("directions", [1, 8, 40, 80, 300])
def test_one_row_fits_with_all_copies_and_its_prompts(tiny_model_dir, directions):
    config = mezo.MeZOConfig(num_directions=directions, rank=1)
    checkpoint = read_checkpoint(tiny_model_dir("llama"))
    sizes = cpu_sizes(config, checkpoint, {"dtype": "float32"}, 64 * GIB)
    copies = 2 * directions
    # A prompt of several options has a request of its own for each copy.
    assert sizes["max_running_requests"] >= max(2 * copies, 128)
    for limit in (sizes["max_total_tokens"], sizes.get("max_prefill_tokens", 16384)):
        assert limit >= copies * checkpoint.max_row_tokens


def test_memory_follows_from_the_checkpoint_and_bounds_the_cache(tmp_path):
    checkpoint = read_checkpoint(large(tmp_path))
    config = mezo.MeZOConfig()
    with pytest.raises(ValueError, match=r"free memory of 64.0 GiB, got \d+.\d GiB \(262.6 of we"):
        cpu_sizes(config, checkpoint, {"dtype": "float32"}, 64 * GIB)
    with pytest.raises(ValueError, match=r"131.3 of weights in bfloat16"):
        cpu_sizes(config, checkpoint, {"dtype": "bfloat16"}, 64 * GIB)
    # 80 layers, 8 heads of 128, keys and values in fp32: 640 KiB a token, 20 GiB for 32768 tokens.
    roomy = cpu_sizes(config, checkpoint, {"dtype": "float32"}, 400 * GIB)
    assert roomy["max_total_tokens"] == 32768
    assert roomy["mem_fraction_static"] > 282.6 / 400
    tight = cpu_sizes(config, checkpoint, {"dtype": "float32"}, 270 * GIB)
    assert 2 * 512 <= tight["max_total_tokens"] < 32768 * 7.5 / 20
    # Prompts to keep have room beside a batch, as far as the memory goes.
    for free, expected in ((400, 32768 + 5000), (270, tight["max_total_tokens"])):
        sizes = cpu_sizes(config, checkpoint, {"dtype": "float32"}, free * GIB, cache_tokens=5000)
        assert sizes["max_total_tokens"] == expected
    # What a user fixes stays, and is counted.
    fixed = {"dtype": "float32", "max_total_tokens": 4096, "max_running_requests": 5}
    sizes = cpu_sizes(config, checkpoint, fixed, 270 * GIB)
    assert set(sizes) == {"mem_fraction_static"}
    with pytest.raises(ValueError, match=r"20\.0 of KV cache"):
        cpu_sizes(config, checkpoint, {**fixed, "max_total_tokens": 32768}, 270 * GIB)
    own = {"dtype": "float32", "mem_fraction_static": 0.5}
    assert "mem_fraction_static" not in cpu_sizes(config, checkpoint, own, 64 * GIB)


def test_free_memory_is_that_of_the_control_group(tmp_path, monkeypatch):
    host = cpu_host.free_memory()
    assert 0 < host <= psutil.virtual_memory().total
    monkeypatch.setattr(cpu_host, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 700000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert cpu_host.free_memory() > 10**6
    (tmp_path / "memory.max").write_text("1000000\n")
    assert cpu_host.free_memory() == 800000


BAD_MODELS = {
    "no such directory": ("/no/such/model", "must be a directory with a model, got '/no/such/mode"),
    "an unknown name": (
        "nobody/no-such-model",
        "must be .* got 'nobody/no-such-model', which is",
    ),
    "None": (None, "must be the path or the hub name of a model, got None"),
    "an empty text": ("", "must be the path or the hub name of a model, got ''"),
    "a number": (3, "must be the path or the hub name of a model, got 3"),
}


@pytest.mark.parametrize(("path", "sentence"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_a_wrong_model_path_is_told_before_anything_starts(path, sentence):
    with pytest.raises(ValueError, match=f"^launch_engine: model_path {sentence}"):
        mezo.launch_engine(path)


BAD_CONFIGS = {
    "broken": ("{", r"config.json' must be JSON, got JSONDecodeError"),
    "a list": ([1], "config.json' must describe a model, got no model_type"),
    "of something else": ({"a": 1}, "config.json' must describe a model, got no model_type"),
    "a model that is too large": (
        LARGE,
        r"must fit into this host's .*[(]2\d+.\d of w",
    ),
}


@pytest.mark.parametrize(("config", "sentence"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_bad_config_is_told_before_anything_starts(tmp_path, config, sentence):
    path = large(tmp_path) if config is LARGE else directory(tmp_path, config)
    children = psutil.Process().children(recursive=True)
    with pytest.raises(ValueError, match=sentence) as caught:
        mezo.launch_engine(path)
    assert str(caught.value).startswith("launch_engine: ")
    assert len(str(caught.value).splitlines()) == 1
    assert psutil.Process().children(recursive=True) == children


def test_a_directory_without_a_model_says_what_it_has(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a config.json, got the directory .* without;"):
        mezo.launch_engine(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="with an adapter; pass the directory of the base model"):
        mezo.launch_engine(tmp_path)


BAD_ARGS = {
    "a typo": (
        {"max_total_token": 1},
        ValueError,
        "got 'max_total_token'; is 'max_total_tokens'",
    ),
    "dtype": ({"dtype": "float64"}, ValueError, "dtype must be one of .* got 'float64'; use 'flo"),
    "torch's dtype": ({"dtype": torch.float32}, ValueError, "dtype must be one of .* got dtype"),
    "quantization": (
        {"quantization": "fp8"},
        NotImplementedError,
        "quantization .* got 'fp8'",
    ),
    "KV dtype": (
        {"kv_cache_dtype": "fp8_e5m2"},
        NotImplementedError,
        "kv_cache_dtype .* got 'fp8",
    ),
    "attention": (
        {"attention_backend": "fa3"},
        NotImplementedError,
        "attention_backend .* 'fa3",
    ),
    "LoRA": ({"lora_backend": "csgmv"}, NotImplementedError, "lora_backend .* got 'csgmv'"),
    "ranks": (
        {"tp_size": 3},
        ValueError,
        "tp_size must divide the model's 4 .* got 3",
    ),
    "ranks as text": ({"tp_size": "2"}, ValueError, "tp_size must be an integer >= 1, got '2'"),
    "memory": ({"mem_fraction_static": 1.5}, ValueError, "mem_fraction_static .* 0 and 1, got 1.5"),
    "requests as text": ({"max_running_requests": "9"}, ValueError, "max_running_.* got '9'"),
    "requests": (
        {"max_running_requests": 1},
        ValueError,
        "max_running_requests .* at least 2",
    ),
    "tokens": ({"max_total_tokens": 3}, ValueError, "max_total_tokens and .* must be at least 4"),
}


@pytest.mark.parametrize(("args", "error", "sentence"), BAD_ARGS.values(), ids=BAD_ARGS.keys())
def test_what_a_cpu_host_does_not_have_is_refused(tiny_model_dir, args, error, sentence):
    children = psutil.Process().children(recursive=True)
    with pytest.raises(error, match=f"^launch_engine: .*{sentence}"):
        mezo.launch_engine(tiny_model_dir("llama"), **args)
    assert psutil.Process().children(recursive=True) == children


BAD_FOR_A_RUN = {
    "slots": ({"max_loras_per_batch": 3}, ValueError, "max_loras_per_batch must be at least 4"),
    "rank": ({"max_lora_rank": 4}, ValueError, "max_lora_rank must be at least .* 8, got 4"),
    "modules": (
        {"lora_target_modules": ["o_proj", "q_proj"]},
        ValueError,
        r"lora_target_modules .* without \['v_proj'\]",
    ),
    "no LoRA": ({"enable_lora": False}, ValueError, "must be started with enable_lora=True"),
    "no cache": (
        {"disable_radix_cache": True},
        NotImplementedError,
        "prefix 'activated' keeps prompts in the radix cache",
    ),
    "pipeline": ({"pp_size": 2}, NotImplementedError, "pp_size must be 1, got 2"),
    "data parallel": ({"dp_size": 2}, NotImplementedError, "dp_size must be 1, got 2"),
}


@pytest.mark.parametrize(
    ("args", "error", "sentence"), BAD_FOR_A_RUN.values(), ids=BAD_FOR_A_RUN.keys()
)
def test_what_could_not_hold_the_run_is_refused(tiny_model_dir, args, error, sentence):
    config = mezo.MeZOConfig(prefix="activated", invocation=(7, 8))
    with pytest.raises(error, match=f"^launch_engine: .*{sentence}"):
        mezo.launch_engine(tiny_model_dir("llama"), config, **args)


def test_a_quantised_checkpoint_is_refused_where_there_are_no_kernels(tmp_path):
    config = {**LARGE, "quantization_config": {"quant_method": "awq", "bits": 4}}
    checkpoint = read_checkpoint(directory(tmp_path, config))
    with pytest.raises(NotImplementedError, match=r"quantization must be one .* got 'awq'"):
        check_cpu_args({"dtype": "float32"}, checkpoint)


def test_an_engine_of_ones_own_must_hold_one_row():
    config = mezo.MeZOConfig(num_directions=80)
    check_one_row("attach", config, requests=160, tokens=320)
    check_one_row("attach", config)
    with pytest.raises(ValueError, match=r"attach: max_running_requests must be at .* 160.* 159"):
        check_one_row("attach", config, requests=159)
    with pytest.raises(ValueError, match=r"max_total_tokens and .* at least 320, .* got 319"):
        check_one_row("attach", config, tokens=319)


@pytest.mark.parametrize(
    ("threads", "given", "expected"),
    [(None, None, "1"), (None, "4", "4"), (None, "4,2", "4,2"), (2, "1", "2"), (2, None, "2")],
)
def test_explicit_threads_go_before_the_environment(monkeypatch, threads, given, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = dict(os.environ)
    variables = _cpu_environment({"tp_size": 2}, threads)
    with _environment(variables, {"OMP_NUM_THREADS"} if threads else set()):
        assert os.environ["OMP_NUM_THREADS"] == expected
        count = int(expected.split(",")[0])
        cores = [part.split(",") for part in os.environ["SGLANG_CPU_OMP_THREADS_BIND"].split("|")]
        assert [len(c) for c in cores] == [count, count]
    assert dict(os.environ) == before
    for bad in (0, "2", 1.5, True):
        with pytest.raises(ValueError, match="threads must be an integer >= 1"):
            mezo.launch_engine("model", threads=bad)


_SCRIPT = """
import signal, sys, warnings
warnings.simplefilter("ignore")
import multiprocessing, time
import mezo

def sleep():
    time.sleep(600)

def main():
    mine = multiprocessing.get_context("spawn").Process(target=sleep, daemon=True)
    mine.start()
    config = mezo.MeZOConfig(rank=2)
    handler = signal.getsignal(signal.SIGQUIT)
    for path in sys.argv[1:-1]:
        try:
            mezo.launch_engine(path, config, threads=1)
        except RuntimeError as error:
            print("RAISED", error, flush=True)
        finally:
            print("FINALLY", flush=True)
        assert multiprocessing.active_children() == [mine] and mine.is_alive()
        assert signal.getsignal(signal.SIGQUIT) is handler
    engine = mezo.launch_engine(sys.argv[-1], config, threads=1)
    with mezo.attach(engine, config) as run:
        loss = run.evaluate(mezo.Batch(prompts=[[5, 6]], completions=[[7]])).loss
    engine.shutdown()
    print("LOSS", loss, flush=True)

if __name__ == "__main__":
    main()
"""


def test_an_engine_that_cannot_start_raises_in_its_caller(tmp_path, tiny_model_dir):
    good = tiny_model_dir("llama")
    truncated, tokenizerless = tmp_path / "truncated", tmp_path / "tokenizerless"
    for path in (truncated, tokenizerless):
        save_tiny_model("llama", str(path))
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    (tokenizerless / "tokenizer.json").write_text("{")
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, truncated, tokenizerless, good],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith(("RAISED", "FINALLY", "LOSS"))]
    assert done.returncode == 0, f"{lines} {done.stderr[-3000:]}"
    assert [line.split()[0] for line in lines] == [*["RAISED", "FINALLY"] * 2, "LOSS"]
    for line in lines[0:4:2]:
        assert "launch_engine: SGLang must start with these arguments, got " in line
    assert "Safetensor" in lines[0]
    assert float(lines[-1].split()[1]) > 0
