"""The Engine protocol, the engine on plain transformers, and which engines are usable here."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, entry_points, version

SGLANG_VERSIONS = ("0.5.17", "0.5.23")


class EngineError(RuntimeError):
    """An engine cannot start, or its self-test failed; one sentence says why."""


def available() -> dict[str, str | None]:
    """Say which engines can be used here: {name: None, or why not in one sentence}.

    Nothing is imported or started for it.
    """
    return {"sglang": _why_not_sglang(), "transformers": _why_not_transformers()}


def _why_not_transformers() -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed; run `pip install transformers`."
    return None


def _why_not_sglang() -> str | None:
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
    oldest, newest = (_number(v) for v in SGLANG_VERSIONS)
    if not oldest <= _number(found) <= newest:
        return (
            f"SGLang must be {SGLANG_VERSIONS[0]} to {SGLANG_VERSIONS[1]}, got {found}; "
            f"run `pip install sglang=={SGLANG_VERSIONS[1]}`."
        )
    return None


def _number(text: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
