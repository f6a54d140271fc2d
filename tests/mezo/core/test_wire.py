"""Messages travel as JSON: every type comes back equal, and a side that differs is told so."""

from __future__ import annotations

import dataclasses
import json
import random
import types
import typing

import pytest

import mezo
from mezo.core import messages
from mezo.core.messages import REQUESTS, VERSION, Hello, Progress, Step, StepReply
from mezo.core.wire import Answer, Failure, FieldsError, Message, WireError, from_json, to_json
from mezo_kernels import TensorSpec

TYPES = [*REQUESTS.values(), *{request.reply for request in REQUESTS.values()}]
ROUNDS = 20


def random_value(hint, rng: random.Random):
    """A value of a type, dataclasses and tuples of any length included."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is mezo.MeZOConfig:
        invocation = rng.choice([None, " The movie was", (3, 4)])
        return mezo.MeZOConfig(rank=rng.randint(1, 64), lr=rng.random(), invocation=invocation)
    if hint is TensorSpec:
        shape = (rng.randint(1, 9), rng.randint(1, 9))
        return TensorSpec("q_proj.lora_A", shape, 2, 0, rng.choice([None, (20, 20)]) or (20, 20))
    if dataclasses.is_dataclass(hint):
        return random_message(hint, rng)
    if origin in (typing.Union, types.UnionType):
        return random_value(rng.choice(args), rng)
    if origin is dict:
        return {f"key {i}": random_value(args[1], rng) for i in range(rng.randint(0, 3))}
    if origin in (tuple, list):
        return origin(random_value(args[0], rng) for _ in range(rng.randint(0, 3)))
    return {
        int: rng.randint(0, 2**40),
        float: rng.choice([rng.uniform(-1e30, 1e30), float("inf"), 0.0, 1e-45]),
        bool: rng.random() < 0.5,
        str: rng.choice(["", "mezo", 'a "quoted" Größe\n']),
        type(None): None,
    }[hint]


def random_message(cls, rng: random.Random):
    hints = typing.get_type_hints(cls)
    return cls(**{f.name: random_value(hints[f.name], rng) for f in dataclasses.fields(cls)})


@pytest.mark.parametrize("cls", TYPES, ids=lambda cls: cls.__name__)
def test_every_type_comes_back_equal(cls):
    rng = random.Random(cls.__name__)
    for _ in range(ROUNDS):
        value = random_message(cls, rng)
        assert from_json(cls, json.loads(json.dumps(to_json(value)))) == value


@pytest.mark.parametrize("operation", REQUESTS)
def test_a_request_and_its_reply_go_there_and_back(operation):
    rng = random.Random(operation)
    asked = random_message(REQUESTS[operation], rng)
    message = Message.of(asked)
    fields = to_json(message)
    # SGLang's RPC channel carries flat scalars only.
    assert all(isinstance(value, (str, int)) for value in fields.values())
    received = Message.read(fields)
    assert received.request() == asked
    reply = random_message(asked.reply, rng)
    answer = Answer.read(Answer.of(received.id, reply).text())
    assert (answer.id, answer.result(asked)) == (message.id, reply)


def test_ids_are_never_the_same():
    assert len({Message.of(Hello()).id for _ in range(100)}) == 100


@pytest.mark.parametrize("error", [ValueError, NotImplementedError, RuntimeError, WireError])
def test_an_error_is_raised_as_its_kind(error):
    answer = Answer.read(Answer.of("1", Failure.of(error("no, 5: five"))).text())
    with pytest.raises(error, match=r"^no, 5: five$"):
        answer.result(Hello())


def test_an_error_of_another_kind_is_named():
    answer = Answer.read(Answer.of("1", Failure.of(KeyError("x"))).text())
    with pytest.raises(RuntimeError, match=r"^KeyError: 'x'$"):
        answer.result(Hello())


def test_unknown_and_missing_fields_are_named_with_both_versions():
    both = f"this side speaks version {VERSION} and the other one {VERSION}: install one mezo-"
    message = Message.of(Progress("mezo"))
    for payload, named in (
        ({}, r"\[\] \(unknown: \[\], missing: \['run'\]\)"),
        ({"run": "mezo", "late": 1}, r"\['late', 'run'\] \(unknown: \['late'\], missing: \[\]\)"),
        ({"name": "mezo"}, r"\['name'\] \(unknown: \['name'\], missing: \['run'\]\)"),
        ([], r"\['\(list\)'\] \(unknown: \['\(list\)'\], missing: \['run'\]\)"),
    ):
        changed = dataclasses.replace(message, payload=json.dumps(payload))
        with pytest.raises(WireError, match=rf"Progress: fields must be \['run'\], got {named}"):
            changed.request()
        with pytest.raises(WireError, match=both):
            changed.request()


def test_fields_of_dataclasses_inside_count_too():
    rng = random.Random(0)
    step = to_json(random_message(Step, rng))
    del step["request"]["rows"]["prefix_adapter"]  # it has a default, but is always sent
    with pytest.raises(FieldsError, match=r"Rows: fields must be .* missing: \['prefix_adapter'\]"):
        from_json(Step, step)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_another_version_is_refused_on_both_sides(version):
    sentence = (
        rf"version must be {VERSION}, got {version}; .*version {VERSION} .* other one {version}"
    )
    with pytest.raises(WireError, match=f"message: {sentence}"):
        dataclasses.replace(Message.of(Hello()), version=version).request()
    answer = dataclasses.replace(Answer.of("1", messages.Done()), version=version)
    with pytest.raises(WireError, match=f"answer: {sentence}"):
        Answer.read(answer.text())


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "1", "reply": {"protocol": 2, "pids": [7]}}',
        '{"id": null, "error": ["KeyError", "\'op\'"]}',
        '{"protocol": 1, "pids": [7]}',
    ],
)
def test_answers_of_plugins_without_versions_are_refused(text):
    with pytest.raises(WireError, match=f"version must be {VERSION}, got an older one"):
        Answer.read(text)


def test_messages_of_callers_without_versions_are_refused():
    with pytest.raises(WireError, match=r"unknown: \['op'\], .* the other one an older one"):
        Message.read({"id": "1", "op": "hello", "payload": "{}"})


def test_an_unknown_operation_is_named():
    message = dataclasses.replace(Message.of(Hello()), operation="breakdown")
    with pytest.raises(WireError, match=r"one of \['apply_updates', .*\], got 'breakdown'"):
        message.request()


@pytest.mark.parametrize("text", ["", "no JSON", "null", "3", '{"other": 1}', "[1]"])
def test_what_is_not_ours_is_no_answer(text):
    assert Answer.read(text) is None


def test_every_request_has_an_operation_a_reply_and_a_handler():
    assert all(REQUESTS[r.operation] is r for r in REQUESTS.values())
    assert all(dataclasses.is_dataclass(r.reply) for r in REQUESTS.values())
    frozen = [cls.__dataclass_params__.frozen for cls in TYPES]
    assert all(frozen)


def test_a_reply_that_is_not_the_requests_is_refused():
    answer = Answer.of("1", messages.Done())
    with pytest.raises(WireError, match="StepReply: fields must be"):
        answer.result(Step("mezo", random_message(messages.StepRequest, random.Random(1))))
    assert StepReply is Step.reply
