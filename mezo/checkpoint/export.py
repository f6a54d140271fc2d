"""A trained adapter in the form that other programs read: PEFT, a merged model, llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mezo._inputs import checked_choice, require
from mezo.checkpoint.atomic import check_output, replace_file
from mezo.checkpoint.gguf_lora import write_gguf_lora
from mezo.checkpoint.peft import ADAPTER_FILES, read_peft
from mezo.checkpoint.peft_fields import check_fields, is_activated, scaling_of
from mezo.checkpoint.run_directory import adapter_directory, base_model_of, loading_of

FORMATS = ("peft", "merged", "gguf-lora")


def export_run(
    run_dir: str | Path,
    *,
    format: str = FORMATS[0],
    output: str | Path,
    model: str | Path | None = None,
) -> Path:
    """Write a run's adapter in another form.

    Args:
        run_dir: the output directory of a training, or a PEFT adapter's directory.
        format: "peft": a copy of the adapter, which has been read and checked. "merged": the base
            model with the adapter in its weights, W + scaling B A in fp32, rounded once to the
            base's dtype; sharded safetensors and tokenizer. "gguf-lora": an adapter file of
            llama.cpp, in fp32. These two are for ordinary adapters only.
        output: a directory; for "gguf-lora" also a file that ends with .gguf.
        model: directory or hub name of the base model; None: the one it was trained on.

    Returns:
        The directory or the file.

    Raises:
        ValueError: no adapter there, or one that the format cannot express.
        ImportError: a package is missing that the format needs.
        OSError: the base model cannot be read, or the output not be written.
    """
    checked_choice("export: format", format, FORMATS, "use 'peft'")
    source, target = adapter_directory(run_dir), Path(output)
    fields, weights = read_peft(source)
    check_fields(fields, str(source))
    require(
        target.resolve() != source.resolve(),
        f"export: output must be another directory than the adapter's, got {target}; choose a new "
        "one.",
    )
    if format == "peft":
        check_output(target, ADAPTER_FILES)
        for name in ADAPTER_FILES:
            replace_file(target / name, (source / name).read_bytes())
        return target
    base = base_model_of(fields, model)
    loading = loading_of(run_dir, has_own_model=model is not None)
    if format == "gguf-lora":
        return write_gguf_lora(fields, weights, base, target, loading)
    return _write_merged(fields, weights, base, target, loading)


def pairs_of(
    weights: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Give (name of the layer, lora_A `[r, D_in]`, lora_B `[D_out, r]`) of an adapter, in fp32.

    Raises:
        ValueError: a tensor without its other half, or none of the two.
    """
    layers = dict.fromkeys(name.rpartition(".")[0] for name in weights)
    for layer in layers:
        names = [f"{layer}.lora_A", f"{layer}.lora_B"]
        require(
            all(name in weights for name in names),
            f"adapter: {layer} must have lora_A and lora_B, got "
            f"{[n for n in weights if n.rpartition('.')[0] == layer]}; save the adapter with PEFT.",
        )
        yield layer, weights[names[0]].float(), weights[names[1]].float()


def _write_merged(
    fields: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    base: str,
    target: Path,
    loading: Mapping[str, Any],
) -> Path:
    """Write the base model with the adapter in its weights, and the tokenizer."""
    require(
        not is_activated(fields),
        "export: a merged adapter must be an ordinary one, got an activated one, whose prompts run "
        "on the base model, so that no one set of weights does what it does; use format "
        "'peft'.",
    )
    require(
        target.resolve() != Path(base).resolve(),
        f"export: output must be another directory than the base model's, got {target}; choose a "
        "new one.",
    )
    check_output(target, ("config.json", "model.safetensors"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, **loading)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **loading)
    merge_(model, fields, weights)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@torch.no_grad()
def merge_(model: Any, fields: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Add an adapter to a model's weights: W + scaling B A in fp32, rounded once to W's dtype.

    Args:
        model: a Hugging Face causal language model; changed in place.
        fields: of adapter_config.json.
        weights: {canonical name: tensor}.

    Raises:
        ValueError: a layer that the model does not have as a linear layer of that shape, one whose
            weights are quantised, or one that shares its weights with the embedding.
    """
    modules = dict(model.named_modules())
    embedding = model.get_input_embeddings().weight
    for layer, a, b in pairs_of(weights):
        weight = getattr(modules.get(layer), "weight", None)
        shape = (b.shape[0], a.shape[1])
        require(
            isinstance(weight, torch.Tensor)
            and weight.is_floating_point()
            and tuple(weight.shape) == shape,
            f"export: the base model must have {layer} as a linear layer of shape {shape}, not "
            f"quantised, got {_described(weight)}; give the model that the adapter was trained on.",
        )
        assert weight is not None
        require(
            weight is not embedding,
            f"export: {layer} must have weights of its own to be merged, got those of the "
            "embedding, which would change too; use format 'peft'.",
        )
        if b.any():  # what is added for other engines is zero, and keeps the bits
            merged = weight.float() + scaling_of(fields, layer) * (b @ a).to(weight.device)
            weight.copy_(merged)


def _described(weight: Any) -> str:
    """A layer's weight in an error sentence."""
    if not isinstance(weight, torch.Tensor):
        return "none"
    return f"{str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}"
