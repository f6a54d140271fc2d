"""Philox words against the known answers of Random123; names and counter layout."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import mezo_kernels as mk

KAT = json.loads((Path(__file__).parent / "kat" / "philox4x32.json").read_text())
VECTORS = [
    (*([int(word, 16) for word in v[field]] for field in ("counter", "key", "words")), v["rounds"])
    for v in KAT["vectors"]
]


@pytest.mark.parametrize(("counter", "key", "words", "rounds"), VECTORS)
def test_reference_gives_the_known_answers(counter, key, words, rounds):
    got = mk.philox4x32(torch.tensor([counter]), torch.tensor(key), rounds=rounds)
    assert got.tolist() == [words]


# The native code has 10 rounds only.
@pytest.mark.parametrize(("counter", "key", "words"), [v[:3] for v in VECTORS if v[3] == 10])
def test_native_gives_the_known_answers(native, isa, counter, key, words):
    # 40 groups before and after put the vector in every lane of a batch.
    first = (counter[0] - 40) % 2**32
    out = torch.empty(81, 4, dtype=torch.int32)
    native.words(out.data_ptr(), first, 81, *counter[1:], *key)
    assert [value & 0xFFFFFFFF for value in out[40].tolist()] == words
    counters = torch.tensor([[(first + i) % 2**32, *counter[1:]] for i in range(81)])
    assert torch.equal(out.long() & 0xFFFFFFFF, mk.philox4x32(counters, torch.tensor(key)))


def test_one_key_per_counter():
    counters = torch.tensor([vector[0] for vector in VECTORS[:3]])
    keys = torch.tensor([vector[1] for vector in VECTORS[:3]])
    assert mk.philox4x32(counters, keys).tolist() == [vector[2] for vector in VECTORS[:3]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_counter_layout(native_normals, backend):
    if mk.backends()[backend] is not None:
        pytest.skip("native module")
    name = "model.layers.3.self_attn.q_proj.lora_A"
    uid = int.from_bytes(hashlib.blake2s(name.encode()).digest()[:4], "little")
    spec = mk.TensorSpec(name, (1, 1), 5, 6, (10, 1001))
    assert spec.uid == uid
    e, seed, step, index = 5 * 1001 + 6, 2**40 + 3, 9, 11
    key = torch.tensor([seed % 2**32, seed // 2**32])
    words = mk.philox4x32(torch.tensor([[e // 4, uid, step, index]]), key)
    z = mk.sample(spec, mk.Direction(seed, step, index), backend=backend)
    assert z.item() == native_normals(words)[0, e % 4].item()
    words = mk.philox4x32(torch.tensor([[e // 128, uid, step, 2**24 + index]]), key)
    bit = int(words[0, e % 128 // 32]) >> (e % 32) & 1
    z = mk.sample(spec, mk.Direction(seed, step, index, "rademacher"), backend=backend)
    assert z.item() == (-1.0 if bit else 1.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-1, 0), r"seed must be an int in \[0, 2\*\*64\), got -1"),
        ((2**64, 0), "seed must be an int"),
        ((0.5, 0), "seed must be an int"),
        ((0, 2**32), r"step must be an int in \[0, 2\*\*32\)"),
        ((0, -1), "step must be an int"),
        ((0, 0, 2**24), r"index must be an int in \[0, 2\*\*24\)"),
        ((0, 0, 0, "normal"), "distribution must be one of .* got 'normal'"),
    ],
)
def test_direction_checks_its_ranges(arguments, match):
    with pytest.raises(ValueError, match=match):
        mk.Direction(*arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("", (1, 1)), "name must not be empty"),
        (("a", (3,)), r"shape of a must be \(rows, cols\), got \(3,\)"),
        (("a", (1, 2, 3)), r"shape of a must be \(rows, cols\)"),
        (("a", (-1, 2)), r"shape of a must be \(rows, cols\)"),
        (("a", (1, 1), 0, 0, (1,)), "global_shape of a must be"),
        (("a", (2, 2), 1, 0), "a must lie inside its global_shape"),
        (("a", (2, 2), 0, 3, (4, 4)), "a must lie inside its global_shape"),
        (("a", (2, 2), -1, 0, (4, 4)), "a must lie inside its global_shape"),
        (("a", (2**17, 2**17)), r"a must have fewer than 2\*\*34 elements"),
    ],
)
def test_tensor_spec_checks_its_place(arguments, match):
    with pytest.raises(ValueError, match=match):
        mk.TensorSpec(*arguments)


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "match"),
    [
        (torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 10, "counter must"),
        (torch.zeros(1, 4), torch.zeros(2, dtype=torch.int64), 10, "counter must be int64"),
        (torch.zeros(1, 4).long(), torch.zeros(3, dtype=torch.int64), 10, "key must be int64"),
        (torch.zeros(1, 4).long(), torch.zeros(2), 10, "key must be int64"),
        (torch.zeros(1, 4).long(), torch.zeros(2).long(), -1, "rounds must be >= 0"),
    ],
)
def test_philox_checks_its_arguments(counter, key, rounds, match):
    with pytest.raises(ValueError, match=match):
        mk.philox4x32(counter, key, rounds=rounds)
