#!/usr/bin/env bash
# llama.cpp's server (in xllamacpp 2026.10.11549) lets an activated LoRA (aLoRA) act from one token
# before its invocation sequence on. PEFT 0.21.2, where such adapters are trained, lets it act from
# the invocation's first token on. The server's log probabilities are those that PEFT gives for an
# invocation that is one token longer at its front, and not those of the adapter as it was made.
#
# Who meets this: who trains an activated LoRA with PEFT or the like, converts it to GGUF with its
# key adapter.alora.invocation_tokens and serves it with llama-server. Nothing fails; the outputs are
# those of another adapter.
#
#   findings/llama_cpp_activated_lora_starts_early.sh      prints both; fails if that changes
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
${PYTHON:-python3} -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 \
  transformers==5.19.0 peft==0.21.2 gguf==0.19.0 xllamacpp==2026.10.11549 numpy==2.4.6

# A random two-layer Llama in both formats, and an adapter on down_proj.
cat >"$work/make.py" <<'PY'
import json
import sys

import gguf
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

work = sys.argv[1]
torch.manual_seed(0)
VOCAB, HIDDEN, HEADS, LAYERS, FFN = 64, 64, 4, 2, 128
PROMPT, INVOCATION = [20, 31, 42, 53], [11, 12, 13]
config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=64,
    rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.2,
)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(f"{work}/base")
state = {name: value.clone() for name, value in model.state_dict().items()}

writer = gguf.GGUFWriter(f"{work}/base.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(HIDDEN)
writer.add_block_count(LAYERS)
writer.add_feed_forward_length(FFN)
writer.add_head_count(HEADS)
writer.add_head_count_kv(HEADS)
writer.add_rope_dimension_count(HIDDEN // HEADS)
writer.add_rope_freq_base(10000.0)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(VOCAB)
writer.add_file_type(gguf.LlamaFileType.ALL_F32)
writer.add_tokenizer_model("llama")
writer.add_token_list([f"<{i}>" for i in range(VOCAB)])
writer.add_token_scores([0.0] * VOCAB)
writer.add_token_types([2, 3, 3] + [1] * (VOCAB - 3))
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_add_bos_token(False)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
for name, value in state.items():
    if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs neighbouring rows
        value = value.view(HEADS, 2, -1, HIDDEN).transpose(1, 2).reshape(HIDDEN, HIDDEN)
    target = names.get_name(name, try_suffixes=(".weight",))
    writer.add_tensor(target, value.float().contiguous().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

lora = LoraConfig(
    r=4, lora_alpha=8, target_modules=["down_proj"], task_type="CAUSAL_LM",
    alora_invocation_tokens=INVOCATION,
)
adapted = get_peft_model(model, lora).eval()
factors = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
for value in factors.values():
    torch.nn.init.normal_(value, std=0.3)
adapted.save_pretrained(f"{work}/adapter")

writer = gguf.GGUFWriter(f"{work}/adapter.gguf", "llama")
writer.add_type(gguf.GGUFType.ADAPTER)
writer.add_file_type(gguf.LlamaFileType.ALL_F32)
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", 8.0)
kind, item = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
writer.add_key_value("adapter.alora.invocation_tokens", INVOCATION, kind, item)
for name, value in factors.items():
    layer = name.split(".layers.")[1].split(".")[0]
    factor = "lora_a" if "lora_A" in name else "lora_b"
    writer.add_tensor(f"blk.{layer}.ffn_down.weight.{factor}", value.detach().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()


def log_probs(invocation):
    fields = json.load(open(f"{work}/adapter/adapter_config.json"))
    fields["alora_invocation_tokens"] = invocation
    json.dump(fields, open(f"{work}/adapter/adapter_config.json", "w"))
    base = LlamaForCausalLM.from_pretrained(f"{work}/base")
    peft = PeftModel.from_pretrained(base, f"{work}/adapter").eval()
    ids = torch.tensor([PROMPT + INVOCATION])
    with torch.no_grad():
        logits = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0, -1].log_softmax(-1).tolist()


base = LlamaForCausalLM.from_pretrained(f"{work}/base").eval()
with torch.no_grad():
    plain = base(torch.tensor([PROMPT + INVOCATION])).logits[0, -1].log_softmax(-1).tolist()
json.dump(
    {
        "ids": PROMPT + INVOCATION,
        "base": plain,
        "as made": log_probs(INVOCATION),
        "one token earlier": log_probs(PROMPT[-1:] + INVOCATION),
    },
    open(f"{work}/expected.json", "w"),
)
PY

cat >"$work/serve.py" <<'PY'
import json
import sys

import xllamacpp

work = sys.argv[1]
expected = json.load(open(f"{work}/expected.json"))


def server(adapter=None):
    params = xllamacpp.CommonParams()
    params.model.path = f"{work}/base.gguf"
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = 1
    if adapter:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = adapter, 1.0
        params.lora_adapters = [info]
    return xllamacpp.Server(params)


def log_probs(server):
    reply = server.handle_completions(
        {"prompt": expected["ids"], "n_predict": 1, "temperature": 0.0, "n_probs": 64,
         "cache_prompt": False, "post_sampling_probs": False}
    )
    reply = json.loads(reply) if isinstance(reply, str) else reply
    found = reply.get("completion_probabilities") or reply["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in found[0]["top_logprobs"]}


def far(got, what):
    worst = max(abs(value - expected[what][token]) for token, value in got.items())
    return "the same" if worst < 0.02 else f"{worst:.1f} nats off"


plain = log_probs(server())
print("base model, against transformers:", far(plain, "base"))
got = log_probs(server(f"{work}/adapter.gguf"))
for what in ("as made", "one token earlier"):
    print(f"adapter, against PEFT with the invocation {what}:", far(got, what))
PY

"$work/venv/bin/python" -W ignore "$work/make.py" "$work" >/dev/null 2>&1
"$work/venv/bin/python" -W ignore "$work/serve.py" "$work" 2>"$work/log" | tee "$work/seen"

diff "$work/seen" - <<'SEEN' || { echo "seen something else than in November 2026" >&2; exit 1; }
base model, against transformers: the same
adapter, against PEFT with the invocation as made: 0.5 nats off
adapter, against PEFT with the invocation one token earlier: the same
SEEN
echo "as in November 2026"
