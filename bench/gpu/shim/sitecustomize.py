"""Goes in front of PYTHONPATH on a box whose transformers is newer than SGLang 0.5.17's.

SGLang registers configurations under names that transformers 5.17 has by now ("qwen3_asr"), and
transformers refuses a name that it knows. Here it accepts it, from the moment SGLang is imported;
SGLang's processes read this file too. The folder also has a stub of FlashInfer, of which SGLang
imports three names on every GPU.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


def accept_known_names() -> None:
    from transformers.models.auto import auto_factory, configuration_auto

    for registry in (configuration_auto._LazyConfigMapping, auto_factory._LazyAutoMapping):

        def register(self, key, value, exist_ok=False, _original=registry.register):
            return _original(self, key, value, exist_ok=True)

        registry.register = register


class BeforeSglang(MetaPathFinder):
    """Finds nothing; it sees that SGLang is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "sglang":
            sys.meta_path.remove(self)
            accept_known_names()
        return None


sys.meta_path.insert(0, BeforeSglang())
