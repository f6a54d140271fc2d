"""SNLI: does a caption entail, contradict or leave open another one?

Source of the wording: the label words of Gao et al. 2021 (LM-BFF, arXiv
2012.15723), in the MeZO paper's template for CB, which is made for a causal model.
"""

from __future__ import annotations

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, jsonl, label_of, text_of

OPTIONS = ("Yes", "Maybe", "No")
LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}


def word(record: Record) -> list[Example]:
    """Premise and question; none for a row whose annotators did not agree."""
    if record.fields.get("gold_label") == "-":
        return []
    premise, hypothesis = text_of(record, "sentence1"), text_of(record, "sentence2")
    prompt = f'Suppose {premise} Can we infer that "{hypothesis}"?'
    return [
        Example(
            prompt,
            options=OPTIONS,
            label=label_of(record, LABELS, "gold_label"),
            where=record.where,
        )
    ]


TASK = Task(
    name="snli",
    load=PublicFiles(
        task="snli",
        train=(
            "snli_1.0_train.jsonl",
            "train.jsonl",
        ),
        test=(
            "snli_1.0_dev.jsonl",
            "dev.jsonl",
        ),
        read=jsonl,
        word=word,
        source="SNLI 1.0",
    ),
    invocation=" Yes, No, or Maybe?\n",
)
