"""SGLang's breakable prefill runner on a CPU: all of its own code but the CUDA graphs themselves.

Where a graph would be replayed, the model's layers run on the graph's filled-up batch instead, in
the surroundings that the runner makes for a replay.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

SIZES = [32, 64, 128, 256]


def install(model_runner):
    """Let the runner have prefill graphs; returns (their backend, a function that takes them away).

    Raises:
        AssertionError: SGLang itself refuses the model or its LoRA.
    """
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.model_executor.runner import EagerRunner, PrefillCudaGraphRunner
    from sglang.srt.model_executor.runner import prefill_cuda_graph_runner as module
    from sglang.srt.model_executor.runner_backend import breakable_cuda_graph_backend as backends

    class Backend(backends.BreakableCudaGraphBackend):
        """A backend without graphs."""

        def __init__(self, runner):
            self.runner = runner
            self.replayed = []  # (tokens, size of the graph)

        @contextmanager
        def capture_session(self, stream):
            with self.replay_session():
                yield

        def capture_one(self, shape_key, forward_fn, **kwargs):
            forward_fn()  # what a capture needs must be there

        def replay(self, shape_key, static_forward_batch, **kwargs):
            self.replayed.append((self.runner.raw_num_tokens, shape_key.size))
            layers = self.runner.layer_model
            positions = self.runner._get_layer_model_positions(static_forward_batch)
            return type(layers).forward(
                layers, static_forward_batch.input_ids, positions, static_forward_batch, None
            )

    class Runner(PrefillCudaGraphRunner):
        """The runner, which captures on no stream."""

        def capture(self):
            with self.backend.capture_session(None):
                for size in self.capture_num_tokens:
                    self.capture_one_shape(size)

    config = _graph_config(model_runner)
    lora = model_runner.lora_manager.lora_backend
    with ExitStack() as stack:
        for owner, name, value in (
            (config, "backend", "breakable"),
            (config, "bs", list(SIZES)),
            (cuda_graph_setup, "PrefillCudaGraphRunner", Runner),
            (module, "resolve_prefill_backend", Backend),
            *_attention_on_cpus(),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        kept = stack.pop_all()
    kept.enter_context(_lora_in_graphs(lora))
    before = model_runner.prefill_cuda_graph_runner
    captured = cuda_graph_setup.capture_prefill_graph(
        model_runner=model_runner, eager_runner=EagerRunner(model_runner)
    )
    assert isinstance(captured.runner, Runner), "SGLang has no prefill graphs for this model"
    model_runner.prefill_cuda_graph_runner = captured.runner

    def remove():
        model_runner.prefill_cuda_graph_runner = before
        kept.close()

    return captured.runner.backend, remove


def lora_addresses(model_runner):
    """Where the tensors lie that the LoRA layers read."""
    return {
        (layer, path, name): tensor.data_ptr()
        for layer, modules in enumerate(model_runner.lora_manager.lora_modules)
        for path, module in modules.items()
        for name, tensor in vars(module).items()
        if name.startswith(("A_buffer", "B_buffer"))
    }


def _graph_config(model_runner):
    """The configuration of prefill graphs that SGLang looks at."""
    from sglang.srt.runtime_context import get_exec

    return get_exec().graph.cuda_graph_config.prefill


def _attention_on_cpus():
    """What to put in the place of an operator that 0.5.17 registers for GPUs only."""
    from sglang.srt.layers import radix_attention

    eager = getattr(radix_attention, "_unified_attention_with_output_impl", None)
    if eager is None:
        return

    def call(*args, use_mha_companion=False, **kwargs):
        return eager(*args, use_mha_companion, False, **kwargs)

    yield radix_attention, "breakable_unified_attention_with_output", call


@contextmanager
def _lora_in_graphs(lora):
    """Let a torch_native LoRA backend do what those that can be captured do.

    Rows that fill up a graph belong to no segment, and nothing is added to them.
    """
    from mezo.engines.sglang.batch import cpu_lora
    from mezo_kernels.cpu import SegmentedLora

    shrink, expand = SegmentedLora.shrink, SegmentedLora.expand_

    def shrink_rows(self, x, *args):
        return _behind(shrink(self, x[: self._num_rows], *args), x.new_zeros(0), len(x))

    def expand_rows(self, out, h, *args):
        expand(self, out[: self._num_rows], h[: self._num_rows], *args)

    def own_rows(call):
        def run(x, *args, base_output=None, **kwargs):
            rows = int(sum(lora.batch_info.seg_lens.tolist()))
            base = None if base_output is None else base_output[:rows]
            out = call(x[:rows], *args, base_output=base, **kwargs)
            return out if base is None else _behind(out, base_output[rows:], len(x))

        return run

    with ExitStack() as stack:
        for owner, name, value in (
            (SegmentedLora, "shrink", shrink_rows),
            (SegmentedLora, "expand_", expand_rows),
            (lora, "supports_prefill_cuda_graph", True),
            (lora, "init_prefill_cuda_graph_batch_info", lambda **_: None),
            (lora, "prefill_cuda_graph_max_bs", 512),
            (lora, "prefill_cuda_graph_max_tokens", max(SIZES)),
            *((lora, name, own_rows(getattr(lora, name))) for name in cpu_lora.LORA_CALLS),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _behind(rows, others, total):
    """Rows, and behind them others or zeros, ``total`` in all."""
    if not len(others):
        others = rows.new_zeros(total - len(rows), rows.shape[1])
    return torch.cat((rows, others))
