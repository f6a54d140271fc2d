"""What `import mezo` does to the process of its user."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.source import ROOT


def test_importing_mezo_has_no_side_effects():
    """Only the two operator schemas of torchvision, on hosts whose torch has no GPU."""
    code = """
import logging, os, signal, sys, threading, torch

def state():
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [signal.getsignal(n) for n in signal.valid_signals()]
    levels = {
        logger.name: (logger.level, tuple(logger.handlers), logger.propagate, logger.disabled)
        for logger in loggers
        if isinstance(logger, logging.Logger)
    }
    return levels, handlers, dict(os.environ), threading.enumerate(), list(sys.path)

before, modules = state(), set(sys.modules)
import mezo
after = state()
new = {name: setting for name, setting in after[0].items() if name not in before[0]}
assert all(setting == (0, (), True, False) for setting in new.values()), new
assert before[0] == {name: after[0][name] for name in before[0]}
assert before[1:] == after[1:]
found = {"sglang", "triton", "transformers", "matplotlib", "typer"} & (set(sys.modules) - modules)
assert not found, found
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("attribute", ["cuda", "hip"])
def test_a_gpu_build_of_torch_gets_no_operators(attribute):
    code = f"""
import torch
torch.version.{attribute} = "1"
import mezo, mezo._host
assert mezo._host._library is None
assert not hasattr(torch.ops.torchvision, "nms")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
