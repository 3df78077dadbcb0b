"""The reader of old torch files gives the tensors, or a clear error, and runs nothing."""

import functools
import importlib.util
import io
import os
import pickle
import struct

import numpy as np
import pytest

from mha_jax import WeightsError
from mha_jax.models import rxnmapper, weights
from mha_jax.models.torch_file import MAGIC, read

NUMBERS = np.arange(12, dtype="<f4")
DATA = struct.pack("<q", 12) + NUMBERS.tobytes()
WRITER = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def whole(*values):
    """Write a tuple of integers."""
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor(shape, strides, offset=0, kind="FloatStorage", view=b"N", make="_rebuild_tensor_v2"):
    """Write a tensor over the storage "a", as torch.save does."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("a") + text("cpu")
    storage += b"K\x0c" + view + b"tQ"
    sizes = b"J" + struct.pack("<i", offset) + whole(*shape) + whole(*strides)
    return (
        f"ctorch._utils\n{make}\n(".encode()
        + storage
        + sizes
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def state(**tensors):
    """Write the object: a dict of tensors, with attributes."""
    items = b"".join(text(name) + value for name, value in tensors.items())
    attributes = b"}" + text("_metadata") + b"}" + text("") + b"}ssb"
    return b"\x80\x02ccollections\nOrderedDict\n)Rq\x00(" + items + b"u" + attributes + b"."


def file(body, magic=MAGIC, version=1001, writer=WRITER, keys=("a",), data=DATA):
    parts = [pickle.dumps(part, 2) for part in (magic, version, writer)]
    return b"".join([*parts, body, pickle.dumps(list(keys), 2), data])


GOOD = file(
    state(x=tensor((3, 4), (4, 1)), turned=tensor((4, 3), (1, 4)), part=tensor((2,), (3,), 5))
)


def test_tensors_come_out_with_their_views():
    got = read(GOOD)
    assert list(got) == ["x", "turned", "part"]
    np.testing.assert_array_equal(got["x"], NUMBERS.reshape(3, 4))
    np.testing.assert_array_equal(got["turned"], NUMBERS.reshape(3, 4).T)
    np.testing.assert_array_equal(got["part"], NUMBERS[[5, 8]])
    got["x"][0] = -1
    np.testing.assert_array_equal(got["turned"][:, 0], NUMBERS[:4])


def test_a_tensor_of_nothing_and_one_of_one_number():
    got = read(file(state(none=tensor((0, 4), (4, 1)), one=tensor((), (), 7))))
    assert got["none"].shape == (0, 4)
    assert got["one"].shape == () and got["one"] == 7


def test_what_torch_writes():
    torch = pytest.importorskip("torch")
    x = torch.arange(35.0).reshape(5, 7)
    saved = {
        "x": x,
        "turned": x.T,
        "part": x[1:4, ::2],
        **{
            str(t): torch.tensor([1, 0, 1]).to(t)
            for t in (torch.float64, torch.float16, torch.bool)
        },
        **{str(t): torch.tensor([1, 2, 3]).to(t) for t in (torch.int64, torch.int32, torch.uint8)},
    }
    stream = io.BytesIO()
    torch.save(saved, stream, _use_new_zipfile_serialization=False)
    got = read(stream.getvalue())
    assert list(got) == list(saved)
    for name, value in saved.items():
        np.testing.assert_array_equal(got[name], value.numpy())
        assert got[name].dtype == value.numpy().dtype


def test_what_torch_writes_of_a_module():
    torch = pytest.importorskip("torch")
    module, stream = torch.nn.Linear(3, 5), io.BytesIO()
    torch.save(module.state_dict(), stream, _use_new_zipfile_serialization=False)
    for name, value in read(stream.getvalue()).items():
        np.testing.assert_array_equal(value, module.state_dict()[name].numpy())


@pytest.mark.skipif(not importlib.util.find_spec("rxnmapper"), reason="rxnmapper is not installed")
def test_the_file_of_rxnmapper_as_torch_reads_it():
    torch = pytest.importorskip("torch")
    name = "pytorch_model.bin"
    data = weights.read_checked(
        "rxnmapper", f"{rxnmapper.FOLDER}/{name}", rxnmapper.SHA256[name], rxnmapper.REQUIREMENT
    )
    want = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    got = read(data)
    assert list(got) == list(want)
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name].numpy())


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, call, *arguments):
        self.what = call, arguments

    def __reduce__(self):
        return self.what


@pytest.fixture
def evil(tmp_path):
    """A pickle that does run, and the folder by which it shows."""
    folder = tmp_path / "made"
    data = pickle.dumps(Evil(os.mkdir, str(folder)), 2)
    pickle.loads(data)
    assert folder.is_dir()
    folder.rmdir()
    return data, folder


@pytest.mark.parametrize("place", ["whole", "first", "inside", "attribute", "keys"])
def test_a_malicious_pickle_is_refused_and_not_run(evil, place):
    data, folder = evil
    inner = data[2:-1]  # without the protocol and the stop
    files = {
        "whole": file(data),
        "first": data,
        "inside": file(state(x=inner)),
        "attribute": file(state(x=tensor((3, 4), (4, 1)))[:-2] + text("k") + inner + b"sb."),
        "keys": file(state(x=tensor((3, 4), (4, 1)))).replace(pickle.dumps(["a"], 2), data),
    }
    with pytest.raises(
        WeightsError, match=r"asks for (posix|nt)\.mkdir, which is no part of a tensor"
    ):
        read(files[place])
    assert not folder.exists()


def test_os_system_is_refused_by_name(tmp_path):
    data = pickle.dumps(Evil(os.system, f"touch {tmp_path / 'made'}"), 2)
    with pytest.raises(WeightsError, match=r"asks for (posix|nt)\.system.*Nothing of it was run"):
        read(file(data))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [eval, getattr, functools.partial, np.frombuffer])
def test_calls_are_refused_in_every_protocol(call, protocol):
    with pytest.raises(WeightsError, match=r"Nothing of it was run"):
        read(file(pickle.dumps(Evil(call, "0", "real"), protocol)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"starts with b'', not with the magic number"),
        (
            b"\x93NUMPY\x01\x00",
            r"starts with b'\\x93NUMPY.*Expected a file that PyTorch before 1\.6",
        ),
        (file(state(), magic=MAGIC + 1), r"not with the magic number of torch\.save"),
        (b"PK\x03\x04rest", r"zip archive, as PyTorch writes since 1\.6.*safetensors\.torch"),
        (file(state(), version=1002), r"version 1002, little-endian\. Expected version 1001"),
        (file(state(), version="x"), r"version str, little-endian"),
        (file(state(), writer={"little_endian": False}), r"not little-endian"),
        (file(state(), writer=[]), r"not little-endian"),
        (
            file(pickle.dumps([1], 2)),
            r"something else than tensors by name\. Expected a state_dict",
        ),
        (file(pickle.dumps({"epoch": 3}, 2)), r"something else than tensors by name"),
        (file(pickle.dumps({1: 2}, 2)), r"a key of a dict is no string"),
        (file(pickle.dumps({"x": 1.5}, 2)), r"the pickle instruction BINFLOAT"),
        (
            file(state(x=tensor((3, 4), (4, 1))), keys=("b",)),
            r"in 1 storages, but others are listed",
        ),
        (file(state(x=tensor((3, 4), (4, 1))), keys=(1,)), r"others are listed"),
        (file(state(x=tensor((3, 5), (5, 1)))), r"x of shape \(3, 5\).*beyond its 12 numbers"),
        (file(state(x=tensor((3, 4), (4, 1), offset=1))), r"reaches beyond its 12 numbers"),
        (file(state(x=tensor((2,), (12,)))), r"reaches beyond its 12 numbers"),
        (file(state(x=tensor((9999, 9999), (0, 0)))), r"reaches beyond its 12 numbers"),
        (file(state(x=tensor((-1, 4), (4, 1)))), r"something else than a storage and sizes"),
        (file(state(x=tensor((3,), (4, 1)))), r"something else than a storage and sizes"),
        (file(state(x=tensor((3,), (1,), offset=-1))), r"something else than a storage and sizes"),
        (file(state(x=tensor((3,), (1,), view=b")"))), r"something else than a whole storage"),
        (file(state(x=tensor((3,), (1,), kind="CustomStorage"))), r"asks for torch\.CustomStorage"),
        (
            file(state(x=tensor((3,), (1,), make="_rebuild_sparse_tensor"))),
            r"_rebuild_sparse_tensor",
        ),
        (
            file(
                state(**{f"x{i}": tensor((9999,), (1,)) for i in range(30)}),
                data=struct.pack("<q", 9999) + bytes(4 * 9999),
            ),
            r"its tensors have 1,199,880 bytes, of [\d,]+ that they would share",
        ),
        (GOOD + b"more", r"goes on after the last storage"),
        (file(state(x=tensor((2,), (1,))), data=b"\xff" * 8), r"0 bytes for 18446744073709551615"),
    ],
)
def test_wrong_files_are_named(data, message):
    with pytest.raises(WeightsError, match=message):
        read(data)


def test_a_zip_that_torch_writes_today():
    torch = pytest.importorskip("torch")
    stream = io.BytesIO()
    torch.save({"x": torch.ones(3)}, stream)
    with pytest.raises(WeightsError, match=r"zip archive"):
        read(stream.getvalue())


def test_every_truncation_is_refused():
    for length in range(len(GOOD)):
        with pytest.raises(WeightsError, match=r"magic number|cut short or damaged"):
            read(GOOD[:length])


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_damaged_bytes_give_tensors_or_a_weights_error():
    """Nothing but a WeightsError escapes, whatever stands in the file."""
    random, refused = np.random.default_rng(0), 0
    for _ in range(3000):
        data = bytearray(GOOD)
        for place in random.integers(0, len(GOOD) - 56, random.integers(1, 4)):
            data[place] = random.integers(256)
        try:
            got = read(bytes(data))
        except WeightsError:
            refused += 1
        else:
            assert all(isinstance(value, np.ndarray) for value in got.values())
    assert refused > 1000
