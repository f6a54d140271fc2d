"""`sglang.mezo_finetune`, which the plugin sets, is `mezo.finetune`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from mezo.engines.sglang.engine import offer_finetune


def test_the_name_that_sglang_has_for_it(monkeypatch):
    sglang = ModuleType("sglang")
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    module = importlib.import_module("mezo.train.finetune")
    monkeypatch.setattr(module, "finetune", lambda *args, **options: (args, options))
    offer_finetune()
    assert sglang.mezo_finetune("model", "rows.csv", lr=1) == (("model", "rows.csv"), {"lr": 1})
