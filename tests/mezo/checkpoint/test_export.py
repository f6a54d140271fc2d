"""What other programs read of an adapter: against PEFT's merge and llama.cpp's conventions."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
import transformers

import mezo
from mezo.checkpoint.export import export_run, merge_
from mezo.checkpoint.peft import read_peft
from tests.support.independent import load_peft
from tests.support.tiny import LINEARS, load_model, make_tokenizer, random_batch

INVOCATION = (77, 8, 200)


@pytest.fixture
def save_run(tiny_model_dir, tmp_path):
    """A function that trains a few steps and leaves a run's directory."""

    def save(architecture="llama", *, target_modules=LINEARS, steps=4, **settings):
        model_dir = tiny_model_dir(architecture)
        config = mezo.MeZOConfig(
            rank=4, alpha=8, lr=1e-2, target_modules=target_modules, seed=3, **settings
        )
        rng = random.Random(architecture)
        with mezo.attach(load_model(model_dir), config, selftest=False) as run:
            for _ in range(steps):
                run.step(random_batch(rng), lr=0.1)
            run.save(tmp_path / "run" / "adapter")
        return model_dir, tmp_path / "run"

    return save


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, *range(20, 40)]])).logits.float()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_a_merged_model_gives_the_logits_of_pefts_merge(save_run, tmp_path, architecture):
    modules = ("qkv_proj", "down_proj") if architecture == "phi3" else LINEARS
    model_dir, run = save_run(architecture, target_modules=modules)
    output = export_run(run, format="merged", output=tmp_path / "merged")
    ours = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    theirs = load_peft(model_dir, run / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    assert (logits(ours) - logits(load_model(model_dir))).abs().max() > 1e-2
    theirs, ours = map(transformers.AutoTokenizer.from_pretrained, (model_dir, output))
    assert ours("w5 w6")["input_ids"] == theirs("w5 w6")["input_ids"]


def test_a_merged_weight_is_rounded_once_to_the_bases_dtype(save_run, tiny_model_dir, tmp_path):
    _, run = save_run(target_modules=("q_proj",))
    load_model(tiny_model_dir("llama")).bfloat16().save_pretrained(tmp_path / "half")
    make_tokenizer().save_pretrained(tmp_path / "half")
    name = "model.layers.1.self_attn.q_proj"
    output = export_run(run, format="merged", output=tmp_path / "out", model=tmp_path / "half")
    merged = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    _, weights = read_peft(run / "adapter")
    delta = 2.0 * weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
    expected = (base.get_submodule(name).weight.float() + delta).bfloat16()
    assert torch.equal(merged.get_submodule(name).weight, expected)
    k_proj = name.replace("q_proj", "k_proj")  # zeros in the adapter's file
    assert torch.equal(merged.get_submodule(k_proj).weight, base.get_submodule(k_proj).weight)


def test_a_copy_is_the_adapter(save_run, tmp_path):
    model_dir, run = save_run(prefix="activated", invocation=INVOCATION)
    for source in (run, run / "adapter"):
        output = export_run(source, format="peft", output=tmp_path / "copy")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (output / file).read_bytes() == (run / "adapter" / file).read_bytes()
    load_peft(model_dir, output)


def read_gguf(path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def test_a_gguf_adapter_of_llama_has_llama_cpps_names_and_order_of_rows(save_run, tmp_path):
    _, run = save_run()
    path = export_run(run, format="gguf-lora", output=tmp_path / "made" / "a.gguf")
    assert path == tmp_path / "made" / "a.gguf"
    fields, tensors = read_gguf(path)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8.0
    assert "adapter.alora.invocation_tokens" not in fields
    _, weights = read_peft(run / "adapter")
    leaves = {
        "self_attn.q_proj": ("attn_q", 4),
        "self_attn.k_proj": ("attn_k", 2),
        "self_attn.v_proj": ("attn_v", None),
        "self_attn.o_proj": ("attn_output", None),
        "mlp.gate_proj": ("ffn_gate", None),
        "mlp.up_proj": ("ffn_up", None),
        "mlp.down_proj": ("ffn_down", None),
    }
    assert len(tensors) == len(weights) == 2 * 2 * len(leaves)
    for layer in range(2):
        for leaf, (name, heads) in leaves.items():
            a, b = (weights[f"model.layers.{layer}.{leaf}.lora_{f}"] for f in "AB")
            assert torch.equal(tensors[f"blk.{layer}.{name}.weight.lora_a"], a)
            if heads is not None:
                # Row 2 i of a head is row i of its first half, row 2 i + 1 that of its second.
                size = b.shape[0] // heads
                order = [
                    h * size + i + j * (size // 2)
                    for h in range(heads)
                    for i in range(size // 2)
                    for j in (0, 1)
                ]
                b = b[order]
            assert torch.equal(tensors[f"blk.{layer}.{name}.weight.lora_b"], b)


@pytest.mark.parametrize(
    ("architecture", "modules", "names"),
    [
        ("qwen2", ("q_proj", "k_proj", "v_proj"), {"attn_q", "attn_k", "attn_v"}),
        ("qwen3", ("o_proj", "down_proj"), {"attn_output", "ffn_down"}),
        ("phi3", ("qkv_proj", "gate_up_proj"), {"attn_qkv", "ffn_up"}),
        ("mistral", ("v_proj",), {"attn_q", "attn_k", "attn_v"}),
    ],
)
def test_a_gguf_adapter_of_another_architecture(save_run, tmp_path, architecture, modules, names):
    _, run = save_run(architecture, target_modules=modules, steps=1)
    fields, tensors = read_gguf(export_run(run, format="gguf-lora", output=tmp_path / "made"))
    expected = "llama" if architecture == "mistral" else architecture
    assert fields["general.architecture"] == expected
    assert {name.split(".")[2] for name in tensors} == names
    if architecture.startswith("qwen"):  # rows stay as they are
        _, weights = read_peft(run / "adapter")
        values = sorted(float(w.double().sum()) for w in weights.values())
        assert values == sorted(float(t.double().sum()) for t in tensors.values())
        theirs, ours = {
            "qwen2": ("self_attn.q_proj", "attn_q"),
            "qwen3": ("mlp.down_proj", "ffn_down"),
        }[architecture]
        b = weights[f"model.layers.0.{theirs}.lora_B"]
        assert torch.equal(tensors[f"blk.0.{ours}.weight.lora_b"], b)


def test_a_gguf_adapter_folds_scalings_that_llama_cpp_does_not_have(save_run, tmp_path):
    _, run = save_run()
    _, plain = read_gguf(export_run(run, format="gguf-lora", output=tmp_path / "plain"))
    edit_config(run, use_rslora=True)
    _, tensors = read_gguf(export_run(run, format="gguf-lora", output=tmp_path / "made"))
    name = "blk.0.ffn_up.weight.lora_"
    assert torch.equal(tensors[f"{name}a"], plain[f"{name}a"])
    assert torch.equal(tensors[f"{name}b"], plain[f"{name}b"] * 2.0)  # sqrt(4) times alpha / 4


def edit_config(run, **fields):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_cannot_be_exported_is_said(save_run, tmp_path, tiny_model_dir, monkeypatch):
    model_dir, run = save_run(prefix="activated", invocation=INVOCATION, steps=1)

    def refused(sentence, error=ValueError, **arguments):
        with pytest.raises(error, match=sentence):
            export_run(**{"run_dir": run, "output": tmp_path / "out", **arguments})

    refused("export: format must be one of .*'merged'.*, got 'onnx'", format="onnx")
    refused(
        "must be an ordinary one, got an activated one, whose prompts run on the base model",
        format="merged",
    )
    refused("got an activated one, which llama.cpp's server lets act", format="gguf-lora")
    refused("output must be another directory than the adapter's", output=run / "adapter")
    refused("run: .*nowhere must be the output .* got no such directory", run_dir="nowhere")
    refused("got a directory without an adapter", run_dir=tmp_path)
    edit_config(run, alora_invocation_tokens=None)
    refused(
        r"must have a base model of one of \['Llama.*got OPTForCausalLM",
        format="gguf-lora",
        model=tiny_model_dir("opt"),
    )
    refused(
        "output must be another directory than the base model's",
        format="merged",
        output=model_dir,
    )
    refused(
        r"must have model.layers.0.* of shape \(.*got none; give the model that",
        format="merged",
        model=tiny_model_dir("opt"),
    )
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("package gguf must be installed", ImportError, format="gguf-lora")
    edit_config(run, base_model_name_or_path=str(tmp_path / "gone"))
    refused(
        r"base model must be .*gone, a directory that is not there; say .*model", format="merged"
    )
    edit_config(run, base_model_name_or_path=None)
    refused(r"base model must be a directory or a hub name, got none; say", format="merged")
    edit_config(run, use_dora=True)
    refused("use_dora must be false")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"{")
    refused("the files in .*adapter must be whole, got")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    refused("adapter_model.safetensors must be a file, got none")


def test_weights_that_others_share_are_not_merged(tiny_model_dir):
    model = load_model(tiny_model_dir("opt"))  # its lm_head is its embedding
    size = tuple(model.lm_head.weight.shape)
    weights = {"lm_head.lora_A": torch.ones(1, size[1]), "lm_head.lora_B": torch.ones(size[0], 1)}
    with pytest.raises(ValueError, match=r"lm_head must have weights of its own .* embedding"):
        merge_(model, {"r": 1, "lora_alpha": 1}, weights)
    with pytest.raises(ValueError, match=r"lm_head must have lora_A and lora_B, got \['lm_head.l"):
        merge_(model, {"r": 1, "lora_alpha": 1}, {"lm_head.lora_A": weights["lm_head.lora_A"]})
