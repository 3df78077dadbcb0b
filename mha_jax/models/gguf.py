"""Facts and tensors out of GGUF files, in which llama.cpp and its relatives keep models.

Such a file is a header (how many facts and tensors there are), facts by name (sizes, the vocabulary), the
name, shape, type and place of every tensor, and the numbers. Most types are blocks of 32 small integers with
a scale, and some with an offset; all become float32 here.

Source: the specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md; the blocks' layouts,
ggml/src/ggml-common.h there.
"""

import dataclasses
import math
import struct
from typing import Any

import numpy as np

from mha_jax.errors import WeightsError
from mha_jax.files import Budget, DamageError, reading

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
_BLOCK = 32
_TEXT, _ARRAY = 8, 9
_NUMBERS = dict(
    zip(
        (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12),
        ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8"),
    )
)
# Name, numbers of a block, and its parts, by the number of a type.
_TYPES = {
    0: ("F32", 1, [("numbers", "<f4", 1)]),
    1: ("F16", 1, [("numbers", "<f2", 1)]),
    3: ("Q4_1", _BLOCK, [("scale", "<f2", 1), ("offset", "<f2", 1), ("pairs", "u1", _BLOCK // 2)]),
    8: ("Q8_0", _BLOCK, [("scale", "<f2", 1), ("numbers", "i1", _BLOCK)]),
}


@dataclasses.dataclass(frozen=True)
class Gguf:
    """What a file holds.

    Args:
      facts: Numbers, texts, lists of texts and arrays, by name: "llama.block_count".
      tensors: Float32 arrays by name, rows first as PyTorch has them.
    """

    facts: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read(data: bytes) -> Gguf:
    """Read a whole file.

    Args:
      data: Its bytes.

    Raises:
      WeightsError: It is of another kind or version, cut short or damaged, or has tensors of types other than
        F32, F16, Q4_1 and Q8_0.

    Cost: 4 bytes for every number of a tensor.

    >>> read(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    Gguf(facts={}, tensors={})
    """
    with reading("the GGUF file", "Copy or install it again.", WeightsError):
        stream = _Stream(data)
        if (magic := bytes(stream.take(4))) != MAGIC:
            raise DamageError(f"it starts with {magic!r}, not with {MAGIC!r}")
        if (version := stream.number("<u4")) not in VERSIONS:
            raise DamageError(f"it is of version {version}, where 2 and 3 can be read")
        tensors, facts = stream.count(24), stream.count(12)
        found = _named([(stream.text(), stream.value(stream.number("<u4"))) for _ in range(facts)])
        places = _named([(stream.text(), stream.tensor()) for _ in range(tensors)])
        alignment = found.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise DamageError(f"its general.alignment is {alignment!r}")
        begin, budget = -(-stream.place // alignment) * alignment, Budget(len(data))
        return Gguf(
            found, {n: _numbers(n, x, stream.data[begin:], budget) for n, x in places.items()}
        )


def _named(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(items)) != len(items):
        raise DamageError("a name is there twice")
    return found


@dataclasses.dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Stream:
    """The bytes from a place on, each taken only where there is one."""

    def __init__(self, data: bytes):
        self.data, self.place = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        if size > (left := len(self.data) - self.place):
            raise DamageError(f"it needs {size:,} bytes at {self.place:,}, where {left:,} are left")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, dtype: str) -> Any:
        return self.numbers(dtype, 1)[0].item()

    def numbers(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def count(self, least: int) -> int:
        """Take the number of things that follow, of at least so many bytes each."""
        (count,) = struct.unpack("<Q", self.take(8))
        if count * least > (left := len(self.data) - self.place):
            raise DamageError(f"it counts {count:,} things where {left:,} bytes are left")
        return count

    def text(self) -> str:
        return str(self.take(self.count(1)), "utf-8")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        of = self.number("<u4") if kind == _ARRAY else kind
        if of == _TEXT:
            return [self.text() for _ in range(self.count(8))]
        if of not in _NUMBERS:
            raise DamageError(f"a fact is of type {of}, which is none, or none of a list's")
        return self.numbers(_NUMBERS[of], self.count(np.dtype(_NUMBERS[of]).itemsize))

    def tensor(self) -> _Place:
        if (rank := self.number("<u4")) > 4:
            raise DamageError(f"a tensor has {rank} axes")
        shape = tuple(self.numbers("<u8", rank)[::-1].tolist())
        return _Place(shape, self.number("<u4"), self.number("<u8"))


def _numbers(name: str, place: _Place, data: memoryview, budget: Budget) -> np.ndarray:
    """Return a tensor as float32."""
    if place.kind not in _TYPES:
        known = ", ".join(_TYPES[kind][0] for kind in _TYPES)
        raise DamageError(f"{name} is of type {place.kind}, where {known} can be read")
    kind, size, parts = _TYPES[place.kind]
    block, count = np.dtype(parts), math.prod(place.shape)
    if place.shape and place.shape[-1] % size:
        raise DamageError(f"{name} of shape {place.shape} is of {kind}, blocks of {size} in a row")
    stored = count // size * block.itemsize
    if place.offset + stored > len(data):
        raise DamageError(
            f"{name} of shape {place.shape} lies from {place.offset:,} to {place.offset + stored:,} of "
            f"{len(data):,} bytes"
        )
    budget.take(name, 4 * count, stored, compressed=True)
    blocks = np.frombuffer(data, block, count // size, place.offset)
    return _values(kind, blocks).reshape(place.shape)


def _values(kind: str, blocks: np.ndarray) -> np.ndarray:
    if kind in ("F32", "F16"):
        return blocks["numbers"].astype(np.float32)
    scale = blocks["scale"].astype(np.float32)
    if kind == "Q8_0":
        return blocks["numbers"] * scale
    # The first half of a block's numbers are the low bits of its bytes, the second the high ones.
    pairs = blocks["pairs"]
    numbers = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
    return numbers * scale + blocks["offset"].astype(np.float32)
