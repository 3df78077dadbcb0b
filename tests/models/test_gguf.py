"""GGUF files: what is in them comes out, and damage ends in a sentence before anything is allocated."""

import struct

import numpy as np
import pytest

from mha_jax import WeightsError
from mha_jax.models import gguf


def text(string):
    data = string.encode()
    return struct.pack("<Q", len(data)) + data


def fact(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


def tensor(name, shape, kind, offset):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def file(facts=(), tensors=(), numbers=b"", version=3):
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(facts))
    head += b"".join([*facts, *tensors])
    return head + bytes(-len(head) % 32) + numbers


FACTS = [
    fact("of.layers", 4, struct.pack("<I", 7)),
    fact("of.base", 6, struct.pack("<f", 0.5)),
    fact("of.bias", 7, b"\x01"),
    fact("of.name", 8, text("né")),
    fact("of.symbols", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
    fact("of.kinds", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
]
DRAW = np.random.default_rng(0)
NIBBLES = DRAW.integers(0, 16, (3, 2, 32))
BYTES = DRAW.integers(-128, 128, (5, 1, 32))
SCALES = np.float16(DRAW.standard_normal((3, 2, 2)))


def packed():
    """Return four tensors, one of every type, and the file's part for them."""
    whole, half = DRAW.standard_normal(3).astype("<f4"), np.array([[1.5, -2.0]], "<f2")
    four, eight = b"", b""
    for nibbles, scales in zip(NIBBLES.reshape(-1, 32), SCALES.reshape(-1, 2)):
        low, high = nibbles[:16], nibbles[16:]
        four += scales.astype("<f2").tobytes() + bytes((low + 16 * high).astype(np.uint8))
    for numbers in BYTES.reshape(-1, 32):
        eight += np.float16(0.25).tobytes() + bytes(numbers.astype(np.int8))
    scale, offset = (np.float32(SCALES[..., i, None]) for i in (0, 1))
    parts = {
        "whole": (whole.tobytes(), 0, whole),
        "half": (half.tobytes(), 1, np.float32(half)),
        "four": (four, 3, (NIBBLES.astype(np.float32) * scale + offset).reshape(3, 64)),
        "eight": (eight, 8, np.float32(0.25) * BYTES.astype(np.float32).reshape(5, 32)),
    }
    places, numbers = [], b""
    for name, (data, kind, values) in parts.items():
        numbers += bytes(-len(numbers) % 32)
        places.append(tensor(name, values.shape, kind, len(numbers)))
        numbers += data
    return places, numbers, {name: values for name, (_, _, values) in parts.items()}


@pytest.mark.parametrize("version", [2, 3])
def test_what_is_in_a_file_comes_out(version):
    places, numbers, expected = packed()
    got = gguf.read(file(FACTS, places, numbers, version))
    kinds = got.facts.pop("of.kinds")
    assert got.facts == {
        "of.layers": 7,
        "of.base": 0.5,
        "of.bias": True,
        "of.name": "né",
        "of.symbols": ["a", ""],
    }
    assert kinds.tolist() == [1, -2, 3]
    assert got.tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert got.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(got.tensors[name], values)


def test_numbers_begin_where_the_alignment_says():
    facts = [fact("general.alignment", 4, struct.pack("<I", 256))]
    data = file(facts, [tensor("x", (1,), 0, 0)])
    data += bytes(-len(data) % 256) + struct.pack("<f", 2.5)
    assert gguf.read(data).tensors["x"].tolist() == [2.5]


ONE = bytes(64)
DAMAGED = [
    (b"GGML" + bytes(20), r"it starts with b'GGML', not with b'GGUF'"),
    (b"GG", r"it needs 4 bytes at 0, where 2 are left"),
    (file(version=1), r"it is of version 1, where 2 and 3 can be read"),
    (
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        r"it counts 1,152,921,504,606,846,976 things where 8",
    ),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 9), r"it counts 9 things where 0 bytes are left"),
    (
        file([fact("x", 9, struct.pack("<IQ", 0, 2**63))]),
        r"it counts 9,223,372,036,854,775,808 things",
    ),
    (
        file([fact("x", 9, struct.pack("<IQ", 9, 1))]),
        r"a fact is of type 9, which is none, or none of a",
    ),
    (file([fact("x", 13, b"")]), r"a fact is of type 13, which is none"),
    (file([fact("x", 8, struct.pack("<Q", 2**40))]), r"it counts 1,099,511,627,776 things where"),
    (file([fact("x", 8, struct.pack("<Q", 1) + b"\xff")]), r"'utf-8' codec can't decode byte 0xff"),
    (file([FACTS[0], FACTS[0]]), r"a name is there twice"),
    (file([fact("general.alignment", 4, bytes(4))]), r"its general.alignment is 0"),
    (file((), [tensor("x", (1,) * 5, 0, 0)], ONE), r"a tensor has 5 axes"),
    (
        file((), [tensor("x", (16,), 0, 4)], ONE),
        r"x of shape \(16,\) lies from 4 to 68 of 64 bytes",
    ),
    (
        file((), [tensor("x", (2**40, 2**40), 0, 0)], ONE),
        r"x of shape .* lies from 0 to 4,835,703,278",
    ),
    (
        file((), [tensor("x", (3,), 2, 0)], ONE),
        r"x is of type 2, where F32, F16, Q4_1, Q8_0 can be read",
    ),
    (
        file((), [tensor("x", (2, 16), 3, 0)], ONE),
        r"x of shape \(2, 16\) is of Q4_1, blocks of 32 in a row",
    ),
    (
        file((), [tensor(str(i), (16,), 0, 0) for i in range(9)], ONE),
        r"6 is said to have 64 bytes, where \d+ of the file's \d+ are left",
    ),
]


@pytest.mark.parametrize(("data", "message"), DAMAGED)
def test_damage_is_told(data, message):
    with pytest.raises(WeightsError, match=message) as caught:
        gguf.read(data)
    assert str(caught.value).startswith("the GGUF file cannot be read: ")
    assert str(caught.value).endswith(". Copy or install it again.")


def test_a_file_cut_short_is_told_wherever_it_ends():
    places, numbers, _ = packed()
    whole = file(FACTS, places, numbers)
    for end in range(0, len(whole), 7):
        with pytest.raises(WeightsError):
            gguf.read(whole[:end])


@pytest.mark.parametrize("value", [0, 127, 255])
def test_a_changed_byte_is_read_or_told(value):
    places, numbers, expected = packed()
    whole = file(FACTS, places, numbers)
    told = 0
    for place in range(0, len(whole) - len(numbers)):
        try:
            got = gguf.read(whole[:place] + bytes([value]) + whole[place + 1 :])
        except WeightsError as error:
            told += 1
            assert len(str(error)) < 400
        else:
            assert len(got.tensors) <= len(expected)
    assert told > 30
