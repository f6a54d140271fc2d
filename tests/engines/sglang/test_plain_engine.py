"""What runs save loads in SGLang without our plugin, and answers as in PEFT."""

from __future__ import annotations

import warnings

import pytest
import torch

import mezo
from mezo.engines.sglang.cpu_host.host import is_cpu_host
from mezo.engines.sglang.launch import _CPU_ARGS
from tests.support import plain_spawn
from tests.support.adapter_cases import PROMPT, peft_logprobs, serve
from tests.support.tiny import LINEARS, load_model

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def engine(tiny_model_dir):
    if not is_cpu_host():
        pytest.skip("starts SGLang as a CPU host needs it")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        from sglang.srt.entrypoints.engine import Engine

        class PlainEngine(Engine):
            run_scheduler_process_func = staticmethod(plain_spawn.run_scheduler_process)
            run_detokenizer_process_func = staticmethod(plain_spawn.run_detokenizer_process)

        patch.setenv("SGLANG_PLUGINS", "none")
        patch.setenv("PYTHONWARNINGS", "ignore")
        engine = PlainEngine(
            **{**_CPU_ARGS, "max_total_tokens": 1024},
            model_path=tiny_model_dir("llama"),
            enable_lora=True,
            max_lora_rank=4,
            max_loras_per_batch=4,
            lora_target_modules=list(LINEARS),
        )
    yield engine
    engine.shutdown()


def test_the_plugin_is_not_there(engine):
    with pytest.raises(RuntimeError, match="plugin must be loaded in SGLang's scheduler processes"):
        mezo.attach(engine, mezo.MeZOConfig(rank=4, target_modules=LINEARS))


@pytest.mark.parametrize(
    "modules",
    [
        ("q_proj", "v_proj"),
        ("q_proj",),
        ("k_proj",),
        ("v_proj", "up_proj"),
        ("gate_proj",),
        ("o_proj", "down_proj"),
        LINEARS,
    ],
    ids="-".join,
)
def test_a_saved_run_loads(engine, tiny_model_dir, tmp_path, modules):
    config = mezo.MeZOConfig(rank=4, alpha=8, target_modules=modules, seed=5)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        run.apply_update([-0.05])
        run.save(tmp_path)
    answer = engine.load_lora_adapter(tmp_path.name, str(tmp_path))
    assert answer.success, answer.error_message
    tokens, ours = serve(engine, tmp_path.name)
    theirs = peft_logprobs(tiny_model_dir("llama"), tmp_path, [*PROMPT, *tokens], len(PROMPT))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert engine.unload_lora_adapter(tmp_path.name).success
