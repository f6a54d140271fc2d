"""Adapters from disk: every field and kind of tensor is PEFT's output, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import pkgutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import mezo
from mezo.checkpoint.peft_fields import FIELDS, HONOURED, IGNORED, REFUSED, TENSORS, check_fields
from tests.support.adapter_cases import (
    BOTH,
    CASES,
    INVOCATION,
    PROMPT,
    Case,
    base_logprobs,
    peft_logprobs,
    serve,
    write,
)
from tests.support.tiny import LINEARS, load_model

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(rank=8, target_modules=("q_proj", "v_proj"), name="run")
DOCS = Path(__file__).parents[3] / "docs" / "adapters.md"
MODULES = [*LINEARS, "embed_tokens", "lm_head"]
FIELD_CASES = [
    pytest.param(kind, case, field, id=f"{field}-{number}-{kind}")
    for field, cases in CASES.items()
    for number, case in enumerate(cases)
    for kind in BOTH
    if not (field == "alora_invocation_tokens" and kind == "ordinary")
]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    """Two slots are left beside the run's: the base model's and one that adapters take in turn."""
    return start_engine(
        model_dir,
        CONFIG,
        max_loras_per_batch=5,
        lora_target_modules=MODULES,
        max_total_tokens=2048,
    )


@pytest.fixture(scope="module")
def run(engine):
    with mezo.attach(engine, CONFIG) as run:
        yield run


@pytest.fixture
def load(engine, run):
    """A function (directory) -> the engine's answer; unloads what it has loaded.

    Names are new every time: SGLang loads one that it has unloaded again when a request names it.
    """
    loaded = []

    def load(directory: Path):
        answer = engine.load_lora_adapter(directory.name, str(directory))
        if answer.success:
            loaded.append(directory.name)
        return answer

    yield load
    for name in loaded:
        assert engine.unload_lora_adapter(name).success


def check_equals_peft(engine, model_dir, directory):
    tokens, ours = serve(engine, directory.name)
    theirs = peft_logprobs(model_dir, directory, [*PROMPT, *tokens], len(PROMPT))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def check_refused(engine, run, model_dir, answer, name, about):
    """A clean refusal: one sentence, nothing left behind, and the engine serves on."""
    assert not answer.success
    assert answer.error_message.startswith(f"adapter {name!r}: {about} must ")
    assert answer.error_message.endswith(".")
    assert "\n" not in answer.error_message
    assert run.session.free_memory()["adapters"] == 3  # the run's own
    with pytest.raises(ValueError, match="never been loaded"):
        serve(engine, name)
    tokens, ours = serve(engine, None)
    theirs = base_logprobs(model_dir, [*PROMPT, *tokens], len(PROMPT))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def skip_unless_served(kind):
    from mezo.engines.sglang.eras import ERA

    if kind == "activated" and not ERA.serves_activated:
        pytest.skip("this SGLang's requests cannot stay out of the radix cache")


def test_the_table_has_every_field_of_peft_and_every_field_has_a_case():
    fields = {f.name: f for f in dataclasses.fields(LoraConfig)}
    assert FIELDS.keys() == fields.keys() == CASES.keys()
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING:
            assert FIELDS[name].default == field.default, name
    for name, cases in CASES.items():
        some_refused = any(case.refused for case in cases)
        some_taken = any(len(case.refused) < len(BOTH) for case in cases)
        assert some_refused if FIELDS[name].verdict == REFUSED else some_taken, name


@pytest.mark.parametrize(("kind", "case", "field"), FIELD_CASES)
def test_a_field_is_pefts_output_or_refused(
    engine, run, load, model_dir, tmp_path, kind, case, field
):
    is_refused = kind in case.refused
    if not is_refused:
        skip_unless_served(kind)
    if is_refused and case.lora:  # PEFT itself refuses to make it for this kind
        case = Case(fields={name: as_json(value) for name, value in case.lora.items()})
    directory = write(model_dir, tmp_path, kind, case)
    answer = load(directory)
    if is_refused:
        check_refused(engine, run, model_dir, answer, directory.name, field)
    else:
        assert answer.success, answer.error_message
        check_equals_peft(engine, model_dir, directory)


def as_json(value):
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


@pytest.mark.parametrize("value", [{"a": 1}, True, "yes", [1], 1], ids=repr)
def test_a_field_that_peft_does_not_have_yet_is_refused_unless_it_is_off(
    engine, run, load, model_dir, tmp_path, value
):
    directory = write(model_dir, tmp_path, "ordinary", Case(fields={"use_next": value}))
    check_refused(engine, run, model_dir, load(directory), directory.name, "use_next")
    config = json.loads((directory / "adapter_config.json").read_text())
    check_fields({**config, "use_next": None, "next_config": {}}, "plain")


def test_a_directory_that_is_not_there_is_named(load, tmp_path):
    message = load(tmp_path / "nothing").error_message
    assert "its path must be a directory with PEFT's files, got" in message
    assert "which does not exist" in message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"target_modules": ["q_proj", "o_proj", "other_proj"]},
            "target_modules must be in the engine's lora_target_modules",
        ),
        ({"r": 1000}, "r must be at most the engine's max_lora_rank"),
        ({"peft_type": "lora"}, "peft_type"),
    ],
)
def test_what_does_not_fit_into_the_pool_is_named(
    engine, run, load, model_dir, tmp_path, change, sentence
):
    directory = write(model_dir, tmp_path, "ordinary", Case())
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert sentence in load(directory).error_message


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules"])
def test_a_field_that_is_not_there_is_named(engine, load, model_dir, tmp_path, field):
    directory = write(model_dir, tmp_path, "ordinary", Case())
    path = directory / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields[field]
    path.write_text(json.dumps(fields))
    message = load(directory).error_message
    assert message == (
        f"adapter_config.json must have the field {field}, got none; save the adapter with PEFT."
    )


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
PREFIX = "base_model.model."


def renamed(tensors, old, new):
    tensors[new] = tensors.pop(old)


# what -> (about which tensor, what makes the file wrong)
BAD_TENSORS = {
    "lora_A is missing": (f"{Q}.lora_B", lambda t: t.pop(f"{PREFIX}{Q}.lora_A.weight")),
    "lora_B is missing": (f"{DOWN}.lora_A", lambda t: t.pop(f"{PREFIX}{DOWN}.lora_B.weight")),
    "a rank of its own": (
        f"{Q}.lora_A",
        lambda t: t.update({f"{PREFIX}{Q}.lora_A.weight": torch.zeros(2, 64)}),
    ),
    "another model's width": (
        f"{DOWN}.lora_A",
        lambda t: t.update({f"{PREFIX}{DOWN}.lora_A.weight": torch.zeros(4, 64)}),
    ),
    "all heads in a grouped projection": (
        "model.layers.0.self_attn.v_proj.lora_B",
        lambda t: t.update(
            {f"{PREFIX}model.layers.0.self_attn.v_proj.lora_B.weight": torch.zeros(64, 4)}
        ),
    ),
    "an empty shard": (
        f"{Q}.lora_B",
        lambda t: t.update({f"{PREFIX}{Q}.lora_B.weight": torch.zeros(0)}),
    ),
    "integers": (
        f"{Q}.lora_B",
        lambda t: t.update({f"{PREFIX}{Q}.lora_B.weight": torch.zeros(64, 4, dtype=torch.int8)}),
    ),
    "a layer too many": (
        "model.layers.2.self_attn.q_proj.lora_A",
        lambda t: t.update(
            {f"{PREFIX}model.layers.2.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}
        ),
    ),
    "a vision tower": (
        "vision_tower.encoder.layers.0.self_attn.q_proj.lora_A",
        lambda t: t.update(
            {
                f"{PREFIX}vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight": (
                    torch.zeros(4, 64)
                )
            }
        ),
    ),
    "a layer without a number": (
        "model.norm.lora_A",
        lambda t: t.update({f"{PREFIX}model.norm.lora_A.weight": torch.zeros(4, 64)}),
    ),
    "a module that target_modules does not name": (
        "model.layers.0.self_attn.o_proj.lora_A",
        lambda t: t.update(
            {f"{PREFIX}model.layers.0.self_attn.o_proj.lora_A.weight": torch.zeros(4, 64)}
        ),
    ),
    "one layer twice": (
        f"{Q}.lora_A",
        lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64)}),
    ),
    "a name without PEFT's prefix": (
        f"{Q}.lora_A",
        lambda t: renamed(t, f"{PREFIX}{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
    ),
    "an adapter's name in the tensors'": (
        f"{Q}.lora_A.default",
        lambda t: renamed(t, f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_A.default.weight"),
    ),
    "an expert": (
        "model.layers.0.mlp.experts.3.gate_proj.lora_A",
        lambda t: t.update(
            {f"{PREFIX}model.layers.0.mlp.experts.3.gate_proj.lora_A.weight": torch.zeros(4, 64)}
        ),
    ),
    "a bias": (
        f"{Q}.lora_B.bias",
        lambda t: t.update({f"{PREFIX}{Q}.lora_B.bias": torch.zeros(64)}),
    ),
    "a magnitude": (
        f"{Q}.lora_magnitude_vector",
        lambda t: t.update({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(64)}),
    ),
    "token deltas": (
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        lambda t: t.update(
            {
                f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": (
                    torch.zeros(2, 64)
                )
            }
        ),
    ),
    "a base weight": (
        f"{Q}",
        lambda t: t.update({f"{PREFIX}{Q}.weight": torch.zeros(64, 64)}),
    ),
    "another lm_head": (
        "lm_head",
        lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(512, 64)}),
    ),
    "an lm_head of more rows": (
        "lm_head",
        lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(514, 64)}),
    ),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_tensor_that_peft_would_not_use_like_this_is_refused(
    engine, run, load, model_dir, tmp_path, what
):
    tensor, edit = BAD_TENSORS[what]
    directory = write(model_dir, tmp_path, "ordinary", Case(), edit=edit)
    answer = load(directory)
    names = [f"{prefix}{tensor}{end}" for prefix in (PREFIX, "") for end in (".weight", "")]
    start = f"adapter {directory.name!r}: "
    about = answer.error_message.removeprefix(start).split(" ")[0]
    assert about in names
    check_refused(engine, run, model_dir, answer, directory.name, about)


def test_a_file_without_adapters_is_refused(engine, run, load, model_dir, tmp_path):
    directory = write(model_dir, tmp_path, "ordinary", Case(), edit=lambda t: t.clear())
    answer = load(directory)
    check_refused(engine, run, model_dir, answer, directory.name, "the file")


def test_what_the_engine_has_no_room_for_is_refused(engine, run, load, model_dir, tmp_path):
    directory = write(model_dir, tmp_path, "ordinary", Case({"rank_pattern": {"q_proj": 9}}))
    answer = load(directory)
    about = f"{PREFIX}{Q}.lora_A.weight"
    check_refused(engine, run, model_dir, answer, directory.name, about)
    assert "max_lora_rank 8, got rank 9" in answer.error_message


def test_fp16_files_and_copies_of_base_weights(engine, load, model_dir, tmp_path):
    def halved(tensors):
        for name in tensors:
            if "lora_" in name:
                tensors[name] = tensors[name].half()

    case = Case({"alpha_pattern": {"q_proj": 5}})
    directory = write(
        model_dir, tmp_path, "ordinary", case, edit=halved, save_embedding_layers=True
    )
    assert f"{PREFIX}lm_head.weight" in load_file(directory / "adapter_model.safetensors")
    assert load(directory).success
    check_equals_peft(engine, model_dir, directory)


def test_embedding_and_lm_head_are_pefts_and_leave_nothing_in_their_slot(
    engine, load, model_dir, tmp_path
):
    """All adapters go through one slot, and each adapts another part of the first one's."""
    targets = {
        "both": ["q_proj", "embed_tokens", "lm_head"],
        "head": ["lm_head"],
        "both_again": ["embed_tokens", "lm_head", "up_proj"],
        "embedding": ["embed_tokens"],
        "neither": ["v_proj"],
    }
    for seed, (name, modules) in enumerate(targets.items()):
        case = Case({"target_modules": modules, "rank_pattern": {"lm_head": 2, "q_proj": 8}})
        directory = write(model_dir, tmp_path / name, "ordinary", case, seed=seed)
        answer = load(directory)
        assert answer.success, answer.error_message
    for name in targets:
        check_equals_peft(engine, model_dir, tmp_path / name)
    for name in reversed(targets):
        check_equals_peft(engine, model_dir, tmp_path / name)


def test_an_activated_adapter_adapts_lm_head_but_no_embedding(
    engine, run, load, model_dir, tmp_path
):
    skip_unless_served("activated")
    case = Case({"target_modules": ["q_proj", "lm_head"]})
    directory = write(model_dir, tmp_path / "head", "activated", case)
    answer = load(directory)
    assert answer.success, answer.error_message
    check_equals_peft(engine, model_dir, directory)
    # PEFT cannot make one with an adapted embedding; this is an ordinary one with another config.
    case = Case({"target_modules": ["embed_tokens"]}, {"alora_invocation_tokens": INVOCATION})
    directory = write(model_dir, tmp_path / "embedding", "ordinary", case)
    about = f"{PREFIX}model.embed_tokens.lora_embedding_A"
    answer = load(directory)
    assert not answer.success
    assert f"{about} must be absent from an activated adapter" in answer.error_message


def test_adapters_from_tensors_go_through_the_same_check(engine, run, model_dir, tmp_path):
    case = Case({"target_modules": ["up_proj", "v_proj"], "use_rslora": True})
    directory = write(model_dir, tmp_path, "ordinary", case)
    fields = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    answer = engine.load_lora_adapter_from_tensors(directory.name, tensors, fields)
    assert answer.success, answer.error_message
    check_equals_peft(engine, model_dir, directory)
    assert engine.unload_lora_adapter(directory.name).success
    for name, about, wrong in (
        ("dora", "use_dora", (tensors, {**fields, "use_dora": True})),
        ("half", f"{PREFIX}x", ({**tensors, f"{PREFIX}x": torch.zeros(1)}, fields)),
    ):
        answer = engine.load_lora_adapter_from_tensors(name, *wrong)
        check_refused(engine, run, model_dir, answer, name, about)


def test_a_run_is_attached_and_its_neighbours_are_named(run, model_dir, tmp_path):
    """The engine's stacks and the model's layers agree on what makes a saved adapter whole."""
    other = mezo.attach(load_model(model_dir), CONFIG)
    assert run.session.partners == other.session.partners
    assert {name.split(".")[-2] for name in run.session.partners} == {"k_proj"}
    other.close()


@pytest.mark.parametrize(
    ("value", "fields", "expected"),
    [
        (None, {}, True),
        ("1", {}, True),
        ("0", {}, False),
        ("0", {"alora_invocation_tokens": INVOCATION}, True),
        ("0", {"alora_invocation_tokens": []}, False),
    ],
)
def test_the_check_can_be_off_for_ordinary_adapters(monkeypatch, value, fields, expected):
    from mezo.engines.sglang.adapter_files import is_checked

    if value is None:
        monkeypatch.delenv("MEZO_CHECK_ADAPTERS", raising=False)
    else:
        monkeypatch.setenv("MEZO_CHECK_ADAPTERS", value)
    assert is_checked(fields) is expected


def test_every_hook_has_a_target_here(engine):
    from mezo.engines.sglang.adapter_files import hooks

    targets = [target for target, _, _ in hooks()]
    assert len(targets) == 7
    assert all(callable(pkgutil.resolve_name(target)) for target in targets)


def test_the_docs_have_the_tables():
    """`MEZO_WRITE_DOCS=1` writes them."""
    text = DOCS.read_text()
    for name, table in (("fields", fields_table()), ("tensors", tensors_table())):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{table}{end}{after}"
    if os.environ.get("MEZO_WRITE_DOCS"):
        DOCS.write_text(text)
    assert DOCS.read_text() == text


def fields_table():
    """A row for every field: what the cases above have shown for both kinds."""
    rows = ["| Field | Ordinary | Activated | |\n", "|---|---|---|---|\n"]
    for name, field in FIELDS.items():
        cells = []
        for kind in BOTH:
            taken = any(kind not in case.refused for case in CASES[name])
            refused = any(kind in case.refused for case in CASES[name])
            if not taken:
                cells.append(REFUSED)
            elif field.verdict == HONOURED or not refused:
                cells.append(field.verdict)
            else:
                cells.append(f"{IGNORED} or {REFUSED}")
        rows.append(f"| `{name}` | {cells[0]} | {cells[1]} | {field.note} |\n")
    return "".join(rows)


def tensors_table():
    rows = ["| Tensor | | |\n", "|---|---|---|\n"]
    rows += [f"| {kind.what} | {kind.verdict} | {kind.note} |\n" for kind in TENSORS]
    return "".join(rows)
