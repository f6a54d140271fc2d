"""Where PEFT's names lie in SGLang's model; no engine is started."""

from __future__ import annotations

import warnings

import pytest
import torch

import mezo.engines.sglang.cpu_host.host

mezo.engines.sglang.cpu_host.host.prepare_import()
pytest.importorskip("sglang")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sglang.srt.layers.utils import PPMissingLayer

    from mezo.engines.sglang.adapter_places import Places


class Layer(torch.nn.Module):
    """What `Places` reads of SGLang's linear layers, which live in an engine only."""

    def __init__(self, d_in, **sizes):
        super().__init__()
        self.input_size = d_in
        for name, value in sizes.items():
            setattr(self, name, value)


def stand_in(**layers):
    """A model of one decoder layer and one that another pipeline stage has."""
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    first = torch.nn.Module()
    for name, layer in layers.items():
        setattr(first, name, layer)
    model.model.layers = torch.nn.ModuleList([first, PPMissingLayer()])
    return model


def test_places_of_fused_layers_under_every_name():
    qkv = Layer(64, total_num_heads=4, total_num_kv_heads=2, head_size=16)
    places = Places(stand_in(qkv_proj=qkv, gate_up_proj=Layer(64, output_sizes=[128, 128])))
    expected = {
        "model.layers.0.q_proj": ("qkv_proj", 64, {"k_proj": 32, "v_proj": 32}),
        "model.layers.0.v_proj": ("qkv_proj", 32, {"q_proj": 64, "k_proj": 32}),
        "model.layers.0.qkv_proj": ("qkv_proj", 128, {}),
        "model.layers.0.up_proj": ("gate_up_proj", 128, {"gate_proj": 128}),
        "model.layers.0.gate_up_proj": ("gate_up_proj", 256, {}),
        "model.language_model.layers.0.q_proj": ("qkv_proj", 64, {"k_proj": 32, "v_proj": 32}),
        "layers.0.q_proj": ("qkv_proj", 64, {"k_proj": 32, "v_proj": 32}),
    }
    for path, (module, d_out, neighbours) in expected.items():
        place = places.find(path)
        found = (place.module, place.d_in, place.d_out, place.neighbours)
        assert found == (module, 64, d_out, neighbours), path
    assert places.find("model.layers.1.q_proj") is None  # on another stage
    for path in ("model.layers.2.q_proj", "visual.layers.0.q_proj", "q_proj", "model.layers.0.fc"):
        with pytest.raises(LookupError, match="must be of a linear layer"):
            places.find(path)
    with pytest.raises(LookupError, match="got Layer, which is not compared with PEFT yet"):
        Places(stand_in(qkv_proj=Layer(64))).find("model.layers.0.q_proj")
