"""Tensors out of the files that `torch.save` wrote before PyTorch 1.6, without PyTorch.

Such a file is a sequence of pickles (a magic number, the version, facts about the writer, the object,
the keys of its storages), then the numbers of each storage. A pickle is a program, which may call
anything, so none is run here: `_Machine` knows the few instructions that build dicts, lists and
tuples, and the two calls that tensors are made of. Whatever else a file asks for is refused by name.
"""

import io
import math
import pickletools
from typing import Any, NamedTuple

import numpy as np

from mha_jax.errors import WeightsError

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
_DTYPES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "i1",
    "torch ByteStorage": "u1",
    "torch BoolStorage": "?",
}
# Tensors may share their numbers, and become copies here: so many bytes for each byte of the file.
_SHARED = 16
_TENSOR = "torch._utils _rebuild_tensor_v2"
_DICT = "collections OrderedDict"
_RESAVE = "Save the weights anew with safetensors.torch.save_file."


class _Name(NamedTuple):
    """The name of a class or a function, never the thing itself."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(data: bytes) -> dict[str, np.ndarray]:
    """Read the tensors of a file by name.

    Args:
      data: The whole file, written by `torch.save(model.state_dict(), path)` before PyTorch 1.6.

    Returns:
      An array for every tensor, each a copy.

    Raises:
      WeightsError: The file is of another kind, is cut short or damaged, or holds anything else than
        a dict of dense tensors.

    >>> read(b"PK\\x03\\x04 and so on")
    Traceback (most recent call last):
      ...
    mha_jax.errors.WeightsError: the file is a zip archive, as PyTorch writes since 1.6. Expected the \
older format. Save the weights anew with safetensors.torch.save_file.
    """
    if not isinstance(data, bytes):
        raise WeightsError(
            f"data must be the bytes of a file: got {type(data).__name__}. Read it first."
        )
    if data.startswith(b"PK\x03\x04"):
        raise WeightsError(
            "the file is a zip archive, as PyTorch writes since 1.6. Expected the older format. "
            f"{_RESAVE}"
        )
    stream = io.BytesIO(data)
    if _first(data, stream) != MAGIC:
        raise WeightsError(
            f"the file starts with {data[:16]!r}, not with the magic number of torch.save. Expected a "
            "file that PyTorch before 1.6 saved."
        )
    version, writer, tensors, keys = (_load(stream) for _ in range(4))
    little = isinstance(writer, dict) and writer.get("little_endian") is True
    if type(version) is not int or version != VERSION or not little:
        kind = version if type(version) is int else type(version).__name__
        raise WeightsError(
            f"the file is of version {kind}, {'little' if little else 'not little'}-endian. Expected "
            f"version {VERSION}, little-endian. {_RESAVE}"
        )
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in tensors.items()
    ):
        raise WeightsError(
            "the file holds something else than tensors by name. Expected a state_dict. " + _RESAVE
        )
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors.values()}
    listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not listed or sorted(keys) != sorted(dtypes):
        raise _damaged(f"its tensors lie in {len(dtypes)} storages, but others are listed")
    storages = {key: _numbers(stream, dtypes[key]) for key in keys}
    if stream.read(1):
        raise _damaged(f"it goes on after the last storage, at byte {stream.tell() - 1}")
    views = {name: _view(name, tensor, storages) for name, tensor in tensors.items()}
    if (total := sum(view.nbytes for view in views.values())) > _SHARED * len(data):
        raise _damaged(f"its tensors have {total:,} bytes, of {len(data):,} that they would share")
    return {name: np.array(view, order="C") for name, view in views.items()}


def _damaged(what: str) -> WeightsError:
    return WeightsError(
        f"the file is cut short or damaged: {what}. Expected a file that torch.save wrote before "
        "PyTorch 1.6, whole. Copy or install it again."
    )


def _first(data: bytes, stream: io.BytesIO) -> Any:
    """Return the first object, or None where the file does not even start as a pickle."""
    return _load(stream) if data.startswith(b"\x80") else None


def _load(stream: io.BytesIO) -> Any:
    """Return the next object of the file."""
    begin, machine = stream.tell(), _Machine()
    try:
        for opcode, value, _ in pickletools.genops(stream):
            machine.step(opcode.name, value)
        (result,) = machine.stack
    except WeightsError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(f"the object at byte {begin} cannot be read ({error})") from error
    return result


class _Machine:
    """The instructions of pickle that dicts of tensors need, on data alone."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, instruction: str, value: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match instruction:
            case "PROTO" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                push(value)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                push({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[instruction])
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self.marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(instruction[-1]))][::-1]))
            case "APPEND":
                item = pop()
                self.stack[-1].extend([item])
            case "APPENDS":
                items = self.marked()
                self.stack[-1].extend(items)
            case "SETITEM":
                item, key = pop(), pop()
                self.stack[-1].update(_items([key, item]))
            case "SETITEMS":
                items = self.marked()
                self.stack[-1].update(_items(items))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[value] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[value])
            case "BUILD":
                pop()  # the attributes of a dict: the versions of its modules
            case "GLOBAL":
                push(_allowed(value))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(_call(function, arguments))
            case "BINPERSID":
                push(_storage(pop()))
            case _:
                raise WeightsError(
                    f"the file has the pickle instruction {instruction}, which no dict of tensors "
                    f"needs. Nothing of it was run. {_RESAVE}"
                )

    def marked(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items


def _items(keys_and_values: list[Any]) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in keys_and_values[::2]):
        raise ValueError("a key of a dict is no string")
    return dict(zip(keys_and_values[::2], keys_and_values[1::2]))


def _allowed(name: str) -> _Name:
    if name not in (_TENSOR, _DICT, *_DTYPES):
        raise WeightsError(
            f"the file asks for {name.replace(' ', '.')}, which is no part of a tensor. Nothing of it "
            "was run. Do not load this file with anything that runs pickles, unless you trust who "
            "made it."
        )
    return _Name(name)


def _call(function: Any, arguments: Any) -> Any:
    """Make the dict or the tensor that a call would make."""
    if function == _Name(_DICT) and arguments == ():
        return {}
    if function == _Name(_TENSOR):
        tensor = _Tensor(*arguments[:4])
        sizes = (tensor.offset, *tensor.shape, *tensor.strides)
        if (
            isinstance(tensor.storage, _Storage)
            and len(tensor.shape) == len(tensor.strides)
            and all(type(size) is int and 0 <= size < 2**40 for size in sizes)
        ):
            return tensor
    raise ValueError("it makes a tensor of something else than a storage and sizes")


def _storage(identity: Any) -> _Storage:
    """Read ("storage", kind, key, device, count, view); the count stands before the numbers, too."""
    kind, dtype, key = identity[:3]
    if kind != "storage" or not isinstance(key, str) or identity[5:] != (None,):
        raise ValueError("it refers to something else than a whole storage")
    return _Storage(key, _DTYPES[dtype.name if isinstance(dtype, _Name) else ""])


def _numbers(stream: io.BytesIO, dtype: str) -> np.ndarray:
    begin = stream.tell()
    count = int.from_bytes(stream.read(8), "little")
    data = stream.read(min(count * np.dtype(dtype).itemsize, stream.getbuffer().nbytes))
    if len(data) != count * np.dtype(dtype).itemsize:
        raise _damaged(f"the storage at byte {begin} has {len(data)} bytes for {count} numbers")
    return np.frombuffer(data, dtype)


def _view(name: str, tensor: _Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    numbers, shape, strides = storages[tensor.storage.key], tensor.shape, tensor.strides
    end = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
    count = math.prod(shape)
    if count > len(numbers) or (count and end > len(numbers)):
        raise _damaged(
            f"{name} of shape {shape} and strides {strides} reaches beyond its {len(numbers)} numbers"
        )
    steps = [stride * numbers.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], shape, steps)
