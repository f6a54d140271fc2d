"""The engines that a run can be attached to. To add one, write its module and a row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mezo._registry import Registry

if TYPE_CHECKING:
    from mezo.config import MeZOConfig
    from mezo.engines.base import Engine, Session

# Nothing is imported until an engine is asked for.
ENGINES: Registry[Engine] = Registry(
    "engine",
    {
        "sglang": "mezo.engines.sglang.engine:ENGINE",
        "transformers": "mezo.engines.transformers:ENGINE",
    },
)


class EngineError(RuntimeError):
    """An engine cannot start, or its self-test failed; one sentence says why."""


def available() -> dict[str, str | None]:
    """Say which engines can be used here: {name: None, or why not in one sentence}.

    No engine is started for it.
    """
    return {name: ENGINES[name].why_not() for name in ENGINES}


def open_session(handle: Any, config: MeZOConfig, tokenizer: Any = None) -> Session:
    """Attach an adapter to an engine's handle.

    Args:
        handle: what the user holds: an ``sglang.Engine``, a Hugging Face model.
        config: the adapter and the estimator.
        tokenizer: the model's tokenizer, in place of the engine's own; or None.

    Returns:
        The session.

    Raises:
        TypeError: no engine knows such a handle.
        ValueError, NotImplementedError, RuntimeError: see `mezo.attach`.
    """
    for name in ENGINES:
        session = ENGINES[name].open(handle, config, tokenizer)
        if session is not None:
            return session
    raise TypeError(
        "attach: engine must be an sglang.Engine or a Hugging Face causal language model, "
        f"got {type(handle).__name__}; make one with mezo.launch_engine(model_path, config)."
    )
