"""Each version of SGLang has its era, and the installed one has what its era says."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from mezo.engines.sglang.cpu_host.host import prepare_import
from mezo.engines.sglang.engine import VERSIONS
from mezo.engines.sglang.eras import ERA, Era, Era0517, Era0519, Era0520, era_of

prepare_import()


@pytest.mark.parametrize(
    ("version", "era"),
    [
        ("0.5.17", Era0517),
        ("0.5.18", Era0517),
        ("0.5.19", Era0519),
        ("0.5.20", Era0520),
        ("0.5.21", Era0520),
        ("0.5.21.post1", Era0520),
        ("0.5.22", Era),
        ("0.5.23", Era),
        ("0.5.23rc0", Era),
        ("0.5.24", Era),
    ],
)
def test_the_version_chooses(version, era):
    assert type(era_of(version)) is era


def test_the_supported_versions_are_the_oldest_and_the_newest_era():
    assert [type(era_of(version)) for version in VERSIONS] == [Era0517, Era]


def test_without_sglang_its_side_can_be_imported():
    """`launch_engine` then says what to install."""
    code = (
        "import importlib.metadata as metadata, sys\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "import mezo\n"
        "metadata.version = version\n"
        "sys.modules['sglang'] = None\n"
        "from mezo.engines.sglang.launch import launch_engine\n"
        "from mezo.engines.sglang.eras import ERA, Era\n"
        "assert type(ERA) is Era\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.sglang
def test_the_installed_version_has_what_its_era_says(no_engine_noise):
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.mem_cache.base_prefix_cache import MatchResult
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.server_args import ServerArgs

    is_new = type(ERA) is Era
    assert hasattr(Req, "set_extend_range") is not is_new
    assert hasattr(UnifiedRadixCache, "lock") is is_new
    assert ("device_prefix_len" in inspect.signature(MatchResult).parameters) is is_new
    assert hasattr(TokenizerManager, "update_request_meta_info") is ERA.tells_meta_info
    assert hasattr(ServerArgs, "resolve_once") is (ERA.resolution == "resolve_once")
    assert {"model_path", "lora_backend"} < set(ERA.argument_names(ServerArgs))
