"""SNLI: does a caption entail, contradict or leave open another one?

Source of the wording: the label words of Gao et al. 2021 (LM-BFF, arXiv
2012.15723), in the MeZO paper's template for CB, which is made for a causal model.
"""

from __future__ import annotations

from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, jsonl
from mezo.tasks.mnli import word

TASK = Task(
    name="snli",
    load=PublicFiles(
        task="snli",
        train=("snli_1.0_train.jsonl", "train.jsonl"),
        test=("snli_1.0_dev.jsonl", "dev.jsonl"),
        read=jsonl,
        word=word,
        source="SNLI 1.0",
    ),
    invocation=" Yes, No, or Maybe?\n",
)
