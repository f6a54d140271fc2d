"""Fixtures for all tests: tiny random models, one SGLang engine a module."""

from __future__ import annotations

import os
import signal
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, which wait for one another where the cores are taken.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: off
import mezo  # first: it lets torchvision and transformers be imported on CPU hosts

# isort: on

import pytest
import torch
import transformers

from tests.support.tiny import save_tiny_model

transformers.logging.disable_progress_bar()
# A shell starts its background jobs with SIGINT ignored, and so would be every process of ours.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--proof", action="store_true", help="run the longer proofs, and only these")


def pytest_collection_modifyitems(config, items):
    is_proof = config.getoption("--proof")
    chosen, left_out = [], []
    for item in items:
        (chosen if ("proof" in item.keywords) == is_proof else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no NVIDIA GPU here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A function (architecture) -> directory of a 2-layer random checkpoint with a tokenizer."""
    made = {}

    def make(architecture: str) -> str:
        if architecture not in made:
            directory = str(tmp_path_factory.mktemp(f"tiny_{architecture}"))
            save_tiny_model(architecture, directory)
            made[architecture] = directory
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def no_engine_noise():
    """SGLang and torch warn while they are imported; not our warnings, so not our errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def start_engine():
    """A function that starts the module's SGLang engine, in place of the one before.

    An engine that has nothing to do still polls for messages, so that two of them share the cores.
    """
    engines = []

    def start(model_dir: str, config: mezo.MeZOConfig, **server_args):
        if engines:
            engines.pop().shutdown()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engines.append(mezo.launch_engine(model_dir, config, **server_args))
        return engines[-1]

    yield start
    if engines:
        engines.pop().shutdown()
