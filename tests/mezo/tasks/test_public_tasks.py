"""The paper's tasks, read from rows in their public formats that are written here."""

from __future__ import annotations

import json

import pytest

from mezo import tasks
from mezo.data.example import Example
from mezo.tasks.files import held_out


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


RECORD = {
    "passage": {
        "text": "Ann met Bob.",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}],
    },
    "qas": [{"query": "It was @placeholder.", "answers": [{"start": 8, "end": 10, "text": "Bob"}]}],
}
MULTIRC = {
    "passage": {
        "text": "P.",
        "questions": [
            {"question": "Q?", "answers": [{"text": "a", "label": 0}, {"text": "b", "label": 1}]}
        ],
    }
}
SQUAD = {
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "C.",
                    "qas": [{"question": "Q?", "answers": [{"text": "x"}, {"text": "y"}]}],
                }
            ],
        }
    ]
}
DROP = {
    "p1": {
        "passage": "P.",
        "qa_pairs": [{"question": "Q?", "answer": {"number": "3", "spans": [], "date": {}}}],
    }
}
NLI = {"gold_label": "neutral", "sentence1": "A.", "sentence2": "B."}
SENTENCES = {"word": "w", "sentence1": "A.", "sentence2": "B.", "label": True}
WSC = {"text": "T.", "target": {"span1_text": "Ann", "span2_text": "She"}, "label": False}
COPA = {
    "premise": "He fell.",
    "choice1": "It hurt.",
    "choice2": "Ok.",
    "question": "effect",
    "label": 0,
}
GLUE = 'sentence\tlabel\na "fine film\t1\n'

# task: (names of both files, their content, the first example's whole text, number of examples)
CASES = {
    "sst2": (("train.tsv", "dev.tsv"), GLUE, 'a "fine film It was great', 1),
    "sst5": (("train.csv", "test.csv"), 'label,sentence\n2,"so, so"\n', "so, so It was okay", 1),
    "trec": (
        ("train_5500.label", "TREC_10.label"),
        "DESC:manner How is it ?\n",
        "How is it ? It asks for a description",
        1,
    ),
    "rte": (
        ("train.jsonl", "val.jsonl"),
        lines({"premise": "A.", "hypothesis": "B.", "label": "not_entailment"}),
        'A.\nDoes this mean that "B." is true? Yes or No?\nNo',
        1,
    ),
    "cb": (
        ("train.jsonl", "val.jsonl"),
        lines({"premise": "A.", "hypothesis": "B", "label": "neutral"}),
        'Suppose A. Can we infer that "B"? Yes, No, or Maybe?\nMaybe',
        1,
    ),
    "snli": (
        ("snli_1.0_train.jsonl", "snli_1.0_dev.jsonl"),
        lines({**NLI, "gold_label": "-"}, NLI),
        'Suppose A. Can we infer that "B."? Yes, No, or Maybe?\nMaybe',
        1,
    ),
    "mnli": (
        ("train.tsv", "dev_matched.tsv"),
        "sentence1\tsentence2\tgold_label\nA.\tB.\tcontradiction\n",
        'Suppose A. Can we infer that "B."? Yes, No, or Maybe?\nNo',
        1,
    ),
    "boolq": (
        ("train.jsonl", "val.jsonl"),
        lines({"passage": "P.", "question": "is it", "label": True}),
        "P. is it?\nAnswer: Yes",
        1,
    ),
    "wic": (
        ("train.jsonl", "val.jsonl"),
        lines(SENTENCES),
        'Does the word "w" have the same meaning in these two sentences? Yes, No?\nA.\nB.\n'
        "Answer: Yes",
        1,
    ),
    "wsc": (
        ("train.jsonl", "val.jsonl"),
        lines(WSC),
        'T.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\nNo',
        1,
    ),
    "copa": (("train.jsonl", "val.jsonl"), lines(COPA), "He fell, so it hurt.", 1),
    "multirc": (
        ("train.jsonl", "val.jsonl"),
        lines(MULTIRC),
        'P.\nQuestion: Q?\nI found this answer "a". Is that correct? Yes or No?\nNo',
        2,
    ),
    "record": (("train.jsonl", "val.jsonl"), lines(RECORD), "Ann met Bob.\n- It was Bob.", 1),
    "squad": (
        ("train-v1.1.json", "dev-v1.1.json"),
        json.dumps(SQUAD),
        "Title: T\nContext: C.\nQuestion: Q?\nAnswer: x\n",
        1,
    ),
    "drop": (
        ("drop_dataset_train.json", "drop_dataset_dev.json"),
        json.dumps(DROP),
        "Passage: P.\nQuestion: Q?\nAnswer: 3\n",
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_words_its_public_files(tmp_path, name):
    (_, test), content, text, count = CASES[name]
    task = tasks.get(name)
    (tmp_path / test).write_text(content, encoding="utf-8")
    found = task.load
    examples = found._examples(tmp_path, found.test, "")
    assert len(examples) == count
    first = examples[0]
    last = first.completion if first.options is None else first.options[first.label]
    assert first.prompt + task.invocation + last == text
    assert str(tmp_path / test) in first.where


def test_record_s_options_have_the_entities_names(tmp_path):
    (tmp_path / "val.jsonl").write_text(lines(RECORD))
    task = tasks.get("record")
    (example,) = task.load._examples(tmp_path, task.load.test, "")
    assert (example.names, example.answers) == (("Ann", "Bob"), ("Bob",))
    assert example.options == (" It was Ann.", " It was Bob.")


@pytest.mark.parametrize("name", CASES)
def test_without_files_a_task_says_which_to_pass(tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"^{name}: data must be .* pass the directory with --data"
    ):
        tasks.get(name).load(None)
    with pytest.raises(ValueError, match=rf"^{name}: .* must be a directory with .* got no"):
        tasks.get(name).load(tmp_path)


def test_splits_share_no_text_and_are_always_alike(tmp_path):
    rows = "".join(f"sentence {i}\t{i % 2}\n" for i in range(100))
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + rows)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nsentence 7\t1\nother\t0\n")
    splits = tasks.get("sst2").load(tmp_path)
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [80, 19, 2]
    prompts = [{e.prompt for e in part} for part in (splits.train, splits.dev, splits.test)]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert tasks.get("sst2").load(tmp_path) == splits


def test_held_out_keeps_groups_together():
    examples = [Example(str(i), options=("a", "b"), label=0, group=str(i // 3)) for i in range(60)]
    train, dev = held_out(examples)
    assert len(dev) == 12
    assert not {e.group for e in train} & {e.group for e in dev}


def test_a_bad_row_is_named(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t2\n")
    with pytest.raises(ValueError, match=r"train.tsv:2: label must be one of .* got '2'"):
        tasks.get("sst2").load(tmp_path)
    good = '{"premise": "a", "hypothesis": "b", "label": "entailment"}\n'
    (tmp_path / "train.jsonl").write_text(good + "[1]\n")
    with pytest.raises(ValueError, match=r"train.jsonl:2 must be an object as .* got \[1\]"):
        tasks.get("rte").load(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"premise": "", "hypothesis": "b", "label": 0}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:1: premise must be a text, got ''"):
        tasks.get("rte").load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_real_tokenizer_keeps_the_parts_apart(tmp_path, name):
    """The whole text has the tokens that its parts have."""
    import transformers

    from mezo.tasks import assets

    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.model_dir())
    (_, test), content, _, _ = CASES[name]
    task = tasks.get(name)
    (tmp_path / test).write_text(content, encoding="utf-8")
    for example in task.load._examples(tmp_path, task.load.test, ""):
        for last in example.options or (example.completion,):
            parts = (example.prompt, task.invocation, last)
            ids = [i for part in parts for i in tokenizer(part)["input_ids"]]
            assert ids == tokenizer("".join(parts))["input_ids"]
