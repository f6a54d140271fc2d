"""SGLang's prefill CUDA graphs in our batches: the breakable ones stay, the others are put aside.

A breakable graph holds a model's layers without their attention. Attention runs between its
segments, through the runner's backend of the moment, and the logits processor behind it: the places
where ours stand. The other kinds hold SGLang's own attention or logits processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mezo.engines.sglang.batch.patch import patched

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

BREAKABLE = "breakable"


@contextmanager
def breakable_only(runner: ModelRunner) -> Iterator[None]:
    """Let the forward inside replay prefill graphs that are breakable, and no others."""
    graph = getattr(runner, "prefill_cuda_graph_runner", None)
    if graph is None or is_breakable(graph):
        yield
        return
    with patched(runner, "prefill_cuda_graph_runner", None):
        yield


def is_breakable(graph: object) -> bool:
    """Whether attention and logits processor of a prefill runner run outside of its graphs."""
    has_eager_tail = getattr(graph, "_uses_eager_prefill_tail", None)
    return (
        # A full graph leaves the logits processor out, too, but not the attention.
        getattr(graph, "prefill_backend_name", None) == BREAKABLE
        and has_eager_tail is not None
        and bool(has_eager_tail())
    )
