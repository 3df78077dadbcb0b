"""Files from strangers: what may be taken out of them, and how damage is told.

Whatever a file declares is compared with the bytes that it has before anything is allocated, and
whatever a damaged file makes a reader raise ends in one sentence. Nothing of a file is executed, and
no other file is opened because a file asks for it.
"""

import contextlib
import io
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mha_jax.errors import MhaError

# A compressed part may be so many times larger than its bytes, and so many bytes beyond.
INFLATION, FREE = 200, 1 << 16

# What the readers of Python, NumPy and HDF5 raise of bytes that are not what they should be.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class DamageError(ValueError):
    """A file declares what it does not hold; the readers here raise it inside `reading`."""


@contextlib.contextmanager
def reading(what: str, expected: str, error: type[MhaError]) -> Iterator[None]:
    """Tell damage of a file in one sentence.

    Args:
      what: The file.
      expected: What it should be and how to get it: a sentence.
      error: The class to raise.
    """
    try:
        yield
    except MhaError:
        raise
    except DAMAGE as cause:
        raise error(f"{what} cannot be read: {reason(cause)}. {expected}") from cause


def reason(error: BaseException) -> str:
    """Return the first line of an error; of a long one the end, where libraries say the cause.

    What tensorstore was asked for, which it adds, is left out.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = line.partition(" [tensorstore_spec=")[0].rstrip(".")
    return line if len(line) <= 200 else f"... {line[-150:]}"


class Budget:
    """The bytes of a file, each of which may be taken once.

    Args:
      size: Bytes of the file.
      packed: Bytes of what it was unpacked from; `size` if it was not.
    """

    def __init__(self, size: int, packed: int | None = None):
        self.size = self.left = size
        self.packed = size if packed is None else packed
        self.growth = INFLATION * self.packed + FREE

    def take(self, what: str, declared: int, stored: int, compressed: bool = False) -> None:
        """Take a part of the file before it is read.

        Args:
          what: Name of the part.
          declared: Bytes that it will have in memory.
          stored: Bytes that it has in the file, as the file says.
          compressed: Whether it is; otherwise it has as many in memory.

        Raises:
          DamageError: The file has not so many bytes, or they cannot become so many.
        """
        if not 0 <= stored <= self.left:
            raise DamageError(
                f"{what} is said to have {stored:,} bytes, where {self.left:,} of the file's "
                f"{self.size:,} are left"
            )
        if not 0 <= declared <= (INFLATION * stored + FREE if compressed else stored):
            raise DamageError(f"{what} is said to grow from {stored:,} bytes to {declared:,}")
        if declared > self.growth:
            raise DamageError(
                f"with {what} its {self.packed:,} bytes are said to grow more than {INFLATION} times"
            )
        self.left -= stored
        self.growth -= declared


def zip_parts(stream: Any, names: Sequence[str]) -> dict[str, bytes]:
    """Return members of a zip archive, whole and checked.

    Raises:
      DamageError: A member is absent, there twice, encrypted, or compressed by other than deflate.
      zipfile.BadZipFile, zlib.error, ...: As `zipfile`; `reading` knows them.
    """
    budget, parts = Budget(stream.seek(0, io.SEEK_END)), {}
    with zipfile.ZipFile(stream) as archive:
        for name in names:
            found = [info for info in archive.infolist() if info.filename == name]
            if len(found) != 1:
                listed = ", ".join(archive.namelist()[:9]) or "nothing"
                raise DamageError(f"it holds {name} {len(found)} times, among {listed}")
            (info,) = found
            if info.flag_bits & 1 or info.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise DamageError(f"{name} is encrypted, or compressed by other than deflate")
            compressed = info.compress_type == zipfile.ZIP_DEFLATED
            budget.take(name, info.file_size, info.compress_size, compressed)
            parts[name] = archive.read(info)
    return parts


def npy_array(data: bytes) -> np.ndarray:
    """Return the array of an `.npy` file that holds nothing but numbers; it looks into `data`.

    Raises:
      DamageError: It has not as many bytes as its header says, or holds objects.
      ValueError: Its header is damaged.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise DamageError(f"its array is of version {version}")
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, by_columns, dtype = read_header(stream)
    begin, count = stream.tell(), math.prod(shape)
    if dtype.hasobject or any(size < 0 for size in shape):
        raise DamageError(f"its array is {dtype} {shape}, which are no numbers")
    if count * dtype.itemsize != len(data) - begin:
        raise DamageError(
            f"its array is said to be {dtype} {shape}, but has {len(data) - begin:,} bytes"
        )
    return np.frombuffer(data, dtype, count, begin).reshape(shape, order="F" if by_columns else "C")


def parse_json(data: bytes) -> Any:
    """Return a JSON object, of which no name is there twice.

    Raises:
      DamageError: It is another value, or a name is there twice.
      ValueError, RecursionError: It is no JSON, or too deep.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise DamageError("a name is there twice in its JSON")
        return found

    value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    if not isinstance(value, dict):
        raise DamageError(f"its JSON is a {type(value).__name__}, not an object")
    return value
