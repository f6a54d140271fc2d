"""`sglang.mezo_finetune`, which the plugin sets, is `mezo.finetune`."""

from __future__ import annotations

import pytest

from mezo.engines.sglang.cpu_host.host import prepare_import
from mezo.engines.sglang.plugin import offer_finetune
from mezo.train import finetune


def test_the_name_that_sglang_has_for_it(monkeypatch):
    prepare_import()
    sglang = pytest.importorskip("sglang")
    monkeypatch.delattr(sglang, "mezo_finetune", raising=False)
    monkeypatch.setattr(finetune, "finetune", lambda *args, **options: (args, options))
    offer_finetune()
    assert sglang.mezo_finetune("model", "rows.csv", lr=1) == (("model", "rows.csv"), {"lr": 1})
