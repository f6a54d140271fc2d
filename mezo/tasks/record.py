"""ReCoRD: which entity of a passage fills the gap in a sentence?

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
"""

from __future__ import annotations

from mezo._inputs import require
from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, inner, items, jsonl, text_of

GAP = "@placeholder"


def word(record: Record) -> list[Example]:
    """One example per query with an answer among the entities; options are the query filled in."""
    passage = inner(record, "passage")
    text = text_of(passage, "text")
    # Offsets count in the text as it stands in the file, and name the last character.
    raw = str(passage.fields["text"])
    spans = [(e.fields.get("start"), e.fields.get("end")) for e in items(passage, "entities")]
    require(
        all(isinstance(a, int) and isinstance(b, int) and 0 <= a <= b < len(raw) for a, b in spans),
        f"{record.where}: entities must have start and end inside of the text, got others; fix the "
        "row.",
    )
    names = list(dict.fromkeys(raw[int(a) : int(b) + 1] for a, b in spans))  # type: ignore[arg-type]
    examples = []
    for query in items(record, "qas"):
        asked = text_of(query, "query")
        right = tuple(dict.fromkeys(text_of(a, "text") for a in items(query, "answers")))
        labels = [i for i, name in enumerate(names) if name in right]
        if labels:
            options = tuple(f" {asked.replace(GAP, name)}" for name in names)
            examples.append(
                Example(
                    f"{text}\n",
                    options=options,
                    label=labels[0],
                    answers=right,
                    names=tuple(names),
                    where=query.where,
                )
            )
    return examples


TASK = Task(
    name="record",
    load=PublicFiles(
        task="record",
        train=("train.jsonl",),
        test=("val.jsonl",),
        read=jsonl,
        word=word,
        source="SuperGLUE's ReCoRD",
    ),
    invocation="-",
    metric="answer_f1",
)
