"""SGLang's own processes on a CPU host, without our plugin: only what such a host needs.

Like `mezo.engines.sglang.cpu_host.spawn`, but pinned memory is turned off here, which the plugin
does otherwise.
"""

from __future__ import annotations

from mezo.engines.sglang.cpu_host.host import prepare_import, unpin_lora_memory

prepare_import()


def run_scheduler_process(*args, **kwargs):
    unpin_lora_memory()
    from sglang.srt.managers.scheduler import run_scheduler_process

    return run_scheduler_process(*args, **kwargs)


def run_detokenizer_process(*args, **kwargs):
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    return run_detokenizer_process(*args, **kwargs)
