"""Where rows come from and how they are worded: each option and what it changes."""

from __future__ import annotations

import json
import time

import datasets
import pytest

from mezo import tasks
from mezo.run import Run
from mezo.train import training
from tests.mezo.data.test_own import TEMPLATE
from tests.support.files import write_jsonl

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"w{5 + i} w{6 + i}"},
            {"role": "assistant", "content": f"w{9 + i} w8 w7"},
        ]
    }
    for i in range(40)
]
TEXTS = [{"prompt": f"w{5 + i} w{6 + i}", "completion": f" w{9 + i}"} for i in range(40)]


@pytest.fixture
def chat_template(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


def first_step(trained, **options):
    """Of the first step: its loss and its tokens; and the run's summary."""
    summary, steps, _ = trained(**options, max_steps=1)
    return steps[0].loss, steps[0].tokens, summary


def test_splits_are_files_of_a_folder(trained, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, count in (("train", 40), ("few", 12), ("test", 7), ("dev", 3)):
        write_jsonl(folder / f"{name}.jsonl", TEXTS[:count])

    def sizes(**options):
        summary = trained(dataset_name=folder, max_steps=1, **options)[0]
        return summary["train_examples"], summary["held_out"]["after"]["num_examples"]

    assert sizes() == (40, 7)
    assert sizes(dataset_train_split="few") == (12, 7)
    assert sizes(dataset_test_split="dev") == (40, 3)
    assert sizes(eval_data=write_jsonl(tmp_path / "other.jsonl", TEXTS[:5])) == (40, 5)


def test_a_configuration_and_a_revision_reach_the_hub(trained, monkeypatch):
    """At the border of `datasets`: there is no network."""
    asked = []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(TEXTS if split == "train" else TEXTS[:6])

    def names(name, config, *, revision):
        asked.append((name, config, "names", revision))
        return ["train", "test"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    more = {"dataset_config": "small", "dataset_revision": "v2"}
    summary, _, _ = trained(dataset_name="someone/rows", max_steps=1, **more)
    assert (summary["train_examples"], summary["held_out"]["after"]["num_examples"]) == (40, 6)
    assert asked == [("someone/rows", "small", x, "v2") for x in ("train", "names", "test")]


def test_columns_name_what_is_read(trained, tmp_path):
    rows = [
        {"a": r["prompt"], "b": r["completion"], "text": f"w{i + 50}"} for i, r in enumerate(TEXTS)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    first_step(trained, dataset_name=path)
    assert "data: text = text" in trained.output
    first_step(trained, dataset_name=path, columns="prompt=a,completion=b")
    assert "data: prompt = a, completion = b" in trained.output


def test_a_template_words_the_rows(trained, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    template = {"prompt": "{prompt} w3 w3", "completion": "{completion}"}
    plain, words, _ = first_step(trained, dataset_name=path)
    worded, more_words, _ = first_step(
        trained, dataset_name=path, set=f"template={json.dumps(template)}"
    )
    # In 4 examples and 2 signs: two words more, and no end-of-sequence token.
    assert more_words == words + 8 * (2 - 1)
    assert plain != worded


def test_the_loss_of_prompts_and_of_assistants(trained, tmp_path, chat_template):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    chats = write_jsonl(tmp_path / "chats.jsonl", CHATS)

    def asks(**options):
        return first_step(trained, **options)[0]

    assert asks(dataset_name=texts) != asks(dataset_name=texts, completion_only_loss=False)
    more = {"dataset_name": chats, "chat_template_path": chat_template}
    assert asks(**more) != asks(**more, assistant_only_loss=True)


def test_a_chat_template_words_chats(trained, tmp_path, chat_template):
    path = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    _, tokens, _ = first_step(trained, dataset_name=path, chat_template_path=chat_template)
    chat_template.write_text(TEMPLATE.replace("'<s> '", "'<s> w5 '"))
    _, more, _ = first_step(trained, dataset_name=path, chat_template_path=chat_template)
    assert more == tokens + 8 * 2  # a word in each of two turns, in 4 examples and 2 signs


@pytest.fixture
def words_task():
    """A task whose prompts have 6 words, with an invocation of one."""
    examples = [
        tasks.Example(f"w{5 + i} w6 w7 w8 w9 w{10 + i}", options=(" bad", " good"), label=i % 2)
        for i in range(20)
    ]
    splits = tasks.Splits(train=examples[:12], dev=[], test=examples[12:])
    tasks.TASKS.register("six", tasks.Task("six", lambda path: splits, " w4"))
    yield {"task": "six", "dataset_name": None}
    tasks.TASKS.unregister("six")


def test_a_task_heeds_invocation_and_length(trained, words_task):
    _, tokens, summary = first_step(trained, **words_task)
    assert summary["config"]["invocation"] == " w4"
    _, more, summary = first_step(trained, **words_task, invocation=" w4 w5 w6")
    assert summary["config"]["invocation"] == " w4 w5 w6"
    assert more == tokens + 8 * 2
    _, fewer, _ = first_step(trained, **words_task, max_length=5)
    assert fewer == tokens - 8 * 3  # of 8 tokens with the option 5 are left


def test_ten_thousand_rows_are_ready_when_the_engine_is(trained, tmp_path, monkeypatch):
    """The first step begins within 3 s of the engine being ready."""
    path = tmp_path / "large.csv"
    path.write_text(
        "text,label\n"
        + "".join(f"{'w7 ' * 40}w{5 + i % 500},{('bad', 'good')[i % 2]}\n" for i in range(10_000))
    )
    times, attach, step = [], training.attach, Run.step

    def ready(*args, **kwargs):
        times.append(time.perf_counter())
        return attach(*args, **kwargs)

    def begins(*args, **kwargs):
        times.append(time.perf_counter())
        return step(*args, **kwargs)

    monkeypatch.setattr(training, "attach", ready)
    monkeypatch.setattr(Run, "step", begins)
    summary, _, _ = trained(dataset_name=path, max_steps=2)
    assert summary["train_examples"] == 9800
    assert times[1] - times[0] < 3


def test_test_rows_are_reported_with_the_metrics_too(trained, rows, tmp_path):
    """Where a validation split chooses, the report is on others."""
    folder = tmp_path / "splits"
    folder.mkdir()
    for name, some in (("train", rows), ("validation", rows[:8]), ("test", rows[8:20])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    summary, _, _ = trained(
        dataset_name=folder, eval_steps=3, load_best_model_at_end=True, metric="f1"
    )
    for when in ("before", "after"):
        assert summary["held_out"][when]["num_examples"] == 12
        assert 0 <= summary["held_out"][when]["f1"] <= 1
