"""What a training trains on, chooses by and reports on, from the user's own data."""

from __future__ import annotations

import datasets
import pytest

from mezo import tasks
from mezo.settings import settings_of
from mezo.train.examples import load_examples, load_test
from tests.mezo.data.test_own import TEMPLATE
from tests.support.files import write_jsonl
from tests.support.tiny import make_tokenizer

ROWS = [{"text": f"w{5 + i % 90} w{5 + i // 90}", "label": "no"} for i in range(600)]
ROWS += [{**row, "text": f"w9 {row['text']}", "label": "yes"} for row in ROWS]
BEST = {"load_best": True, "eval_steps": 2, "max_steps": 4}
SAID = "data: what is reported on held-out examples is also what the adapter is chosen by"


def loaded(data, *, tokenizer=None, **options):
    in_memory = not isinstance(data, str)
    options = {"batch_size": 1, "output": "out", **options}
    settings, config = settings_of(data="in memory" if in_memory else data, **options)
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return load_examples(settings, config, tokenizer, data=data if in_memory else None)


def folder(path, **sizes):
    for name, rows in sizes.items():
        write_jsonl(path / f"{name}.jsonl", rows)
    return str(path)


def prompts(examples):
    return {example.prompt for example in examples}


def test_what_is_evaluated_on_is_a_sample_and_is_said(tmp_path):
    path = folder(tmp_path, train=ROWS, test=ROWS[::-1])  # sorted by label
    found = loaded(path)
    labels = [example.label for example in found.test]
    assert len(labels) == 200
    assert 60 < sum(labels) < 140
    assert "data: 200 of 1200 held-out rows are used, taken at random; eval_examples raises it" in (
        found.sentences
    )
    assert prompts(loaded(path).test) == prompts(found.test)
    other = loaded(path, eval_data=str(tmp_path / "train.jsonl"))
    assert prompts(other.test) == prompts(found.test)  # whatever their order
    assert not any(
        "held-out rows are used" in s for s in loaded(path, eval_examples=1200).sentences
    )


@pytest.mark.parametrize("name", ["validation", "dev", "valid", "val", "eval"])
def test_a_validation_split_is_chosen_by_and_test_reported_on(name, tmp_path):
    sizes = {"train": ROWS[:40], name: ROWS[50:60], "test": ROWS[70:85]}
    path = folder(tmp_path, **sizes, more=ROWS[:9])
    source = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows) for split, rows in sizes.items()}
    )
    for data in (path, source):
        found = loaded(data, columns="prompt=text,completion=label", **BEST)
        assert (len(found.train), len(found.held_out), len(found.test)) == (40, 10, 15)
        assert f"data: evaluated on split {name}, reported on others" in found.sentences
        assert not any(s.startswith(SAID) for s in found.sentences)


def test_a_validation_split_alone_is_evaluated_on(tmp_path):
    path = folder(tmp_path, train=ROWS[:40], dev=ROWS[50:60])
    found = loaded(path, columns="prompt=text,completion=label")
    assert (len(found.train), len(found.held_out)) == (40, 10)
    assert found.test is found.held_out
    # Not what is trained or reported on already.
    found = loaded(path, columns="prompt=text,completion=label", test_split="dev", **BEST)
    assert found.test is found.held_out
    assert any(s.startswith(SAID) for s in found.sentences)


@pytest.mark.parametrize("more", [BEST, {**BEST, "load_best": False, "patience": 2}])
def test_what_is_chosen_by_and_reported_on_alike_is_said(more, tmp_path):
    path = folder(tmp_path, train=ROWS[:40], test=ROWS[50:60])
    columns = {"columns": "prompt=text,completion=label"}
    for data, options in ((path, columns), (ROWS[:40], columns)):
        assert sum(s.startswith(SAID) for s in loaded(data, **options, **more).sentences) == 1
        assert not any(s.startswith(SAID) for s in loaded(data, **options).sentences)


def test_a_task_without_a_dev_split_says_what_it_chooses_by():
    examples = [tasks.Example(f"w{i}", options=(" a", " b"), label=0) for i in range(5, 15)]
    splits = tasks.Splits(train=examples[:5], dev=[], test=examples[5:])
    tasks.TASKS.register("no dev", tasks.Task("no dev", lambda path: splits, " w4"))
    try:
        settings, config = settings_of(task="no dev", output="out", batch_size=1, **BEST)
        assert load_examples(settings, config, make_tokenizer()).sentences[0].startswith(SAID)
    finally:
        tasks.TASKS.unregister("no dev")


def test_turns_of_one_chat_are_not_torn_apart():
    chats = [
        {
            "messages": [
                {"role": role, "content": f"w{5 + i} w{6 + turn}"}
                for turn in range(3)
                for role in ("user", "assistant")
            ]
        }
        for i in range(40)
    ]
    found = loaded(chats, assistant_only_loss=True)
    assert (len(found.train), len(found.held_out)) == (32 * 3, 8 * 3)
    assert not {e.where for e in found.train} & {e.where for e in found.held_out}


def test_duplicates_are_on_one_side_and_rows_stay_where_they_were():
    rows = [*ROWS[:30], *ROWS[600:630]]
    doubled = loaded([*rows, *rows], columns="prompt=text,completion=label")
    assert not prompts(doubled.train) & prompts(doubled.held_out)
    relabelled = loaded([*rows, *({**row, "label": "no"} for row in rows)])
    assert not prompts(relabelled.train) & prompts(relabelled.held_out)
    first = prompts(loaded(rows).held_out)
    grown = prompts(loaded([{**ROWS[700], "label": "no"}, *rows]).held_out)
    assert len(first & grown) >= len(first) - 1 > 5


def test_names_of_splits_that_the_data_does_not_have(tmp_path):
    path = folder(tmp_path, train=ROWS[:40])
    one = f"{path}/train.jsonl"
    columns = {"columns": "prompt=text,completion=label"}
    for data in (one, ROWS[:40], datasets.Dataset.from_list(ROWS[:40])):
        with pytest.raises(ValueError, match="train_split must name a split, got 'few' for data"):
            loaded(data, train_split="few", **columns)
        with pytest.raises(ValueError, match="dataset_test_split must name a split, got 'few'"):
            loaded(data, test_split="few", **columns)
    with pytest.raises(ValueError, match="dataset_test_split must name a split, got 'few', which"):
        loaded(path, test_split="few", **columns)
    found = loaded(one, test_split="train", eval_data=path, **columns)
    assert len(found.test) == 40


def test_what_the_data_warns_of_is_said():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    found = loaded(ROWS[:40], columns="prompt=text,completion=label", tokenizer=tokenizer)
    assert sum("the tokenizer has no eos_token" in s for s in found.sentences) == 1


@pytest.mark.parametrize("name", ["dataset_config", "dataset_revision"])
def test_a_configuration_is_of_a_hub_data_set(name, tmp_path):
    path = folder(tmp_path, train=ROWS[:40])
    columns = {"columns": "prompt=text,completion=label"}
    for data in (path, f"{path}/train.jsonl", ROWS[:40], datasets.Dataset.from_list(ROWS[:40])):
        with pytest.raises(ValueError, match="dataset_revision must come with a hub data set, got"):
            loaded(data, **{name: "v2"}, **columns)


def test_other_examples_of_a_task_are_of_one_of_its_splits(tmp_path):
    three = [[tasks.Example(f"w{i}", options=(" a", " b"), label=0)] for i in (5, 6, 7)]
    splits = tasks.Splits(*three)
    tasks.TASKS.register("three", tasks.Task("three", lambda path: splits, " w4"))
    try:
        settings, config = settings_of(task="three", output="out")
        for name, expected in (("train", 0), ("dev", 1), ("test", 2), (None, 2)):
            found = load_test(settings, config, make_tokenizer(), tmp_path, split=name)
            assert found == three[expected]
        with pytest.raises(ValueError, match=r"eval: split must be one of .* of a task, got 'few'"):
            load_test(settings, config, make_tokenizer(), tmp_path, split="few")
    finally:
        tasks.TASKS.unregister("three")
