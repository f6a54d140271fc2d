"""SGLang as one of the engines. It is imported when one is launched or attached."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any

from mezo._closing import closing
from mezo._logging import show_warnings
from mezo.config import MeZOConfig

if TYPE_CHECKING:
    from mezo.engines.base import Session

VERSIONS = ("0.5.17", "0.5.23")


class SglangEngine:
    """See `mezo.engines.base.Engine`."""

    def why_not(self) -> str | None:
        """Return why SGLang cannot be used here, in one sentence, or None."""
        return why_not()

    @contextmanager
    def launch(
        self,
        model: str,
        config: MeZOConfig,
        *,
        threads: int | None = None,
        max_tokens_per_forward: int | None = None,
        cache_tokens: int = 0,
        arguments: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Start an engine with `mezo.launch_engine`."""
        options |= arguments or {}
        if max_tokens_per_forward is not None:
            options["max_prefill_tokens"] = max_tokens_per_forward
        from mezo.engines.sglang.launch import launch_engine

        engine = launch_engine(model, config, threads=threads, cache_tokens=cache_tokens, **options)
        with closing(engine.shutdown):
            yield engine

    def open(self, handle: Any, config: MeZOConfig, tokenizer: Any) -> Session | None:
        """Attach an adapter to an ``sglang.Engine``."""
        if not (hasattr(handle, "collective_rpc") and hasattr(handle, "server_args")):
            return None
        from mezo.engines.sglang.session import SglangSession

        show_warnings(handle.server_args.log_level)
        return SglangSession(handle, config, tokenizer)


ENGINE = SglangEngine()


def why_not() -> str | None:
    """Return why SGLang cannot be used here, in one sentence, or None. Nothing is imported."""
    if importlib.util.find_spec("sglang") is None:
        return (
            "SGLang is not installed; on a GPU host run `pip install 'mezo-sglang[sglang]'`, on a "
            "CPU host `make setup` in a clone."
        )
    if not any(point.name == "mezo" for point in entry_points(group="sglang.srt.plugins")):
        return (
            "SGLang does not see the mezo plugin; install mezo-sglang (`pip install .`) instead of "
            "running it from a source folder."
        )
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return "SGLang has no version metadata; install it from a wheel."
    oldest, newest = (_number(v) for v in VERSIONS)
    if not oldest <= _number(found) <= newest:
        return (
            f"SGLang must be {VERSIONS[0]} to {VERSIONS[1]}, got {found}; "
            f"run `pip install sglang=={VERSIONS[1]}`."
        )
    return None


def offer_finetune() -> None:
    """Set ``sglang.mezo_finetune`` in this process: `mezo.finetune`."""
    import sglang

    def mezo_finetune(*args: Any, **kwargs: Any) -> Any:
        """See `mezo.finetune`."""
        from mezo.train.finetune import finetune

        return finetune(*args, **kwargs)

    sglang.mezo_finetune = mezo_finetune


def _number(text: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
