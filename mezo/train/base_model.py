"""The base model of a training, as its settings name it: for the engine, and its tokenizer."""

from __future__ import annotations

from typing import Any

from mezo._inputs import one_line
from mezo.config import TrainConfig


def launch_options(settings: TrainConfig) -> dict[str, Any]:
    """Return what settings say about loading the model, by the names of `Engine.launch`."""
    options = {
        "revision": settings.model_revision,
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code or None,
        "max_tokens_per_forward": settings.max_tokens_per_forward,
        "arguments": settings.engine_args,
    }
    return {name: value for name, value in options.items() if value is not None}


def load_tokenizer(model: str, settings: TrainConfig) -> Any:
    """Load a model's tokenizer.

    Args:
        model: directory or hub name.
        settings: have its revision, and whether its repository may run code of its own.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model,
            revision=settings.model_revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        words = one_line(error)
        raise ValueError(
            f"model: {model!r} must be a directory or hub name with a tokenizer, got "
            f"{type(error).__name__}: {words[:300]}; check the name, or pass a directory."
        ) from error
