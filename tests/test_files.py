"""Files from strangers: they read no other file, declare no more than they hold, and end in a sentence."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zipfile
import zlib

import h5py
import numpy as np
import pytest

from mha_jax.errors import DataError, WeightsError
from mha_jax.files import (
    FREE,
    INFLATION,
    Budget,
    DamageError,
    npy_array,
    reading,
    reason,
    zip_parts,
)
from mha_jax.interop import keras
from tests.drawn import damaged

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLACE = "layers/multi_head_attention"
SHAPES = {"query": (7, 2, 3), "key": (7, 2, 3), "value": (7, 2, 5), "output": (2, 5, 7)}
CONFIG = {"name": "attention", "num_heads": 2, "key_dim": 3, "value_dim": 5, "use_bias": False}


def kernel(name):
    return f"{PLACE}/{name}_dense/vars/0"


def hdf5(change=None, path=None):
    """Return the bytes of a `.weights.h5` file with one attention layer, changed."""
    stream = io.BytesIO() if path is None else path
    with h5py.File(stream, "w") as file:
        for name, shape in SHAPES.items():
            file[kernel(name)] = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        file.create_group(f"{PLACE}/vars").attrs["name"] = "attention"
        if change is not None:
            change(file)
    return stream.getvalue() if path is None else path.read_bytes()


def archive(config=None, weights=None, compression=zipfile.ZIP_STORED):
    """Return the bytes of a `.keras` file."""
    if not isinstance(config, bytes):
        layer = {"class_name": "MultiHeadAttention", "config": CONFIG if config is None else config}
        config = json.dumps({"config": {"layers": [layer]}}).encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("config.json", config)
        file.writestr("model.weights.h5", hdf5() if weights is None else weights)
    return stream.getvalue()


def replaced(name, make):
    """Return a change: another dataset in the place of a kernel."""

    def change(file):
        del file[kernel(name)]
        make(file, kernel(name))

    return change


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(data, name="file"):
        pathlib.Path(name).write_bytes(data)
        return keras.load(name)

    return load


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_whole_files_are_read(load, compression):
    for data in (hdf5(), archive(compression=compression)):
        module, variables = load(data)
        assert (module.name, module.value_dim) == ("attention", 5)
        got = variables["params"]["query"]["kernel"]
        np.testing.assert_array_equal(got, np.arange(42, dtype=np.float32).reshape(7, 2, 3))


def test_compressed_datasets_are_read(load):
    def compress(file, place):
        options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        file.create_dataset(place, data=np.ones((7, 2, 3), np.float32), **options)

    _, variables = load(hdf5(replaced("query", compress)))
    assert (variables["params"]["query"]["kernel"] == 1).all()


def external(file, place):
    file.create_dataset(place, (7, 2, 3), np.float32, external=[("secret", 0, 168)])


def virtual(file, place):
    layout = h5py.VirtualLayout((7, 2, 3), np.float32)
    layout[...] = h5py.VirtualSource("secret", kernel("query"), shape=(7, 2, 3))
    file.create_virtual_dataset(place, layout)


def external_link(file, place):
    file[place] = h5py.ExternalLink("secret", kernel("query"))


def soft_link(file, place):
    file[place] = h5py.SoftLink(place)


def external_group(file, place):
    file[place.rpartition("/")[0] + "/more"] = h5py.ExternalLink("secret", "/")
    file[place] = np.ones((7, 2, 3), np.float32)


@pytest.mark.parametrize("kind", [external, virtual, external_link, external_group, soft_link])
def test_no_other_file_is_read(load, tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_bytes(b"TOP SECRET " * 60 if kind is external else hdf5())
    for data in (hdf5(replaced("query", kind)), archive(weights=hdf5(replaced("query", kind)))):
        with pytest.raises(WeightsError, match=r"file cannot be read: .*Nothing of it was read\."):
            load(data)


def test_no_other_file_is_opened(tmp_path):
    """Whoever opens the pipe that stands in the other file's place waits for ever."""
    kinds = (external_link, external_group, virtual, external)
    for kind in kinds:
        (tmp_path / kind.__name__).write_bytes(hdf5(replaced("query", kind)))
    os.mkfifo(tmp_path / "secret")
    program = """
import sys
from mha_jax import WeightsError
from mha_jax.interop import keras
for name in sys.argv[1:]:
    try:
        keras.load(name)
    except WeightsError as error:
        assert "Nothing of it was read" in str(error)
    else:
        sys.exit("read")
"""
    command = [sys.executable, "-c", program, *[kind.__name__ for kind in kinds]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def deep(file):
    file.create_group("/".join(["layers"] * 300))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replaced("query", lambda f, p: f.create_dataset(p, (2**40, 2, 3), np.float32)),
            r"said to grow from 0 bytes to 26,388,279,066,624",
        ),
        (
            replaced(
                "query",
                lambda f, p: f.create_dataset(
                    p, (2**30, 2, 3), np.float32, chunks=(2**10, 2, 3), compression="gzip"
                ),
            ),
            r"said to grow from 0 bytes to 25,769,803,776",
        ),
        (
            replaced("query", lambda f, p: f.create_dataset(p, data=[b"x"], dtype="S9")),
            r"query_dense/vars/0' is stored not as numbers",
        ),
        (
            replaced("query", lambda f, p: f.create_dataset(p, data="x")),
            r"query_dense/vars/0' is stored not as numbers",
        ),
        (
            replaced("query", lambda f, p: f.create_dataset(p, data=h5py.Empty("f4"))),
            r"query_dense/vars/0' is stored not as numbers",
        ),
        (
            replaced(
                "query",
                lambda f, p: f.create_dataset(p, data=np.ones(3, [("a", "f4"), ("b", "f4")])),
            ),
            r"query_dense/vars/0' is stored not as numbers",
        ),
        (
            replaced("query", lambda f, p: f.create_dataset(p, data=np.ones(9), scaleoffset=2)),
            r"by filters \[6\], of its own",
        ),
        (lambda f: f[f"{PLACE}/vars"].attrs.create("name", [1, 2]), r"a name is no text"),
        (lambda f: f.__setitem__("type", np.dtype("f4")), r"it has a Datatype at 'type'"),
        (deep, r"it has groups in groups, .* too deep"),
        (
            lambda f: f[f"{PLACE}/query_dense/vars"].create_dataset("2", data=1.0),
            r"query_dense holds more than a kernel and a bias: the layer was quantized",
        ),
        (
            replaced("query", lambda f, p: f.create_group(p)),
            r"the kernels of an attention layer: found",
        ),
    ],
)
def test_malicious_and_damaged_hdf5(load, change, message):
    with pytest.raises(WeightsError, match=message):
        load(hdf5(change))


def test_a_heap_without_an_end_is_refused(load):
    """HDF5 itself would walk round in it for ever."""
    data = hdf5()
    place = data.index(b"GCOL") + 16 + 16 + 16 + 8
    for size in (0, 2**64 - 1, 7, 2**20):
        with pytest.raises(WeightsError, match=r"the heap of text at byte \d+ has sizes"):
            load(data[:place] + struct.pack("<Q", size) + data[place + 8 :])


def giant_member():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", b"{}")
        file.writestr("model.weights.h5", bytes(50_000_000))
    return stream.getvalue()


def grown_twice():
    """Return an archive whose member grows within bounds, and a dataset of the member again."""

    def compress(file, place):
        shape = 2**18, 2, 3
        dataset = file.create_dataset(place, shape, "f4", chunks=shape, compression="gzip")
        packer = zlib.compressobj(9)
        flushed = [packer.compress(bytes(900)) + packer.flush(zlib.Z_FULL_FLUSH)] * (
            2**18 * 24 // 900
        )
        left = packer.compress(bytes(2**18 * 24 % 900)) + packer.flush()
        dataset.id.write_direct_chunk((0, 0, 0), b"".join([*flushed, left]))
        file["noise"] = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)

    weights = hdf5(replaced("query", compress))
    return archive(weights=weights, compression=zipfile.ZIP_DEFLATED)


def lying_member():
    """Return an archive whose stored member is said to be of four gigabytes."""
    data = archive()
    size, lie = struct.pack("<I", len(hdf5())), struct.pack("<I", 2**32 - 2)
    return data.replace(size, lie)


def twice():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("config.json", b"{}")
        file.writestr("config.json", b"{}")
        file.writestr("model.weights.h5", b"")
    return stream.getvalue()


def encrypted():
    data = bytearray(archive())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(b"{"), r"Expecting property name"),
        (archive(b"[" * 100_000), r"recursion"),
        (archive(b'{"a":' * 100_000 + b"0" + b"}" * 100_000), r"recursion"),
        (archive(b"[]"), r"its JSON is a list"),
        (archive(b"\xff"), r"utf-8"),
        (archive({"name": "attention"}), r"the arguments of the layer 'attention' are damaged"),
        (
            archive(CONFIG | {"num_heads": "2"}),
            r"the arguments of the layer 'attention' are damaged",
        ),
        (archive(CONFIG | {"num_heads": 3}), r"the weights do not fit"),
        (archive(weights=b""), r"cannot be read"),
        (archive(weights=b"PK\x03\x04"), r"cannot be read"),
        (archive(compression=zipfile.ZIP_BZIP2), r"compressed by other than deflate"),
        (archive(compression=zipfile.ZIP_LZMA), r"compressed by other than deflate"),
        (archive()[:-30], r"not a zip file"),
        (giant_member(), r"model\.weights\.h5 is said to grow from [\d,]+ bytes to 50,000,000"),
        (
            grown_twice(),
            r"query_dense/vars/0' its [\d,]+ bytes are said to grow more than 200 times",
        ),
        (lying_member(), r"model\.weights\.h5 is said to have 4,294,967,294 bytes"),
        (twice(), r"it holds config\.json 2 times"),
        (encrypted(), r"config\.json is encrypted"),
        (hdf5()[:-500], r"truncated"),
        (b"", r"is not a file that Keras saved: it starts with b''"),
        (b"\x89HDF\r\n\x1a\n", r"cannot be read"),
        (b"{}", r"weight_map"),
        (
            b'{"weight_map": {"/a": ["../m.weights.h5"]}}',
            r"lists '\.\./m\.weights\.h5', which is no",
        ),
        (b'{"weight_map": {"/a": ["/m.weights.h5"]}}', r"lists '/m\.weights\.h5'"),
        (b'{"weight_map": {"/a": ["secret"]}}', r"lists 'secret', which is no"),
        (b'{"weight_map": {"/a": ["none.weights.h5"]}}', r"No such file"),
        (b'{"weight_map": {"/a": [{}]}}', r"unhashable"),
        (b'{"weight_map": 3}', r"values"),
    ],
)
def test_damaged_keras_files(load, data, message):
    with pytest.raises(WeightsError, match=message):
        load(data)


def test_shards_lie_beside_their_list_and_are_no_links(load, tmp_path):
    shards = {f"m_{i}.weights.h5": name for i, name in enumerate(SHAPES)}
    for shard, name in shards.items():
        with h5py.File(shard, "w") as file:
            file[kernel(name)] = np.ones(SHAPES[name], np.float32)
    listed = {"weight_map": {f"/{PLACE}/x": list(shards)}}
    module, variables = load(json.dumps(listed).encode(), "m.weights.json")
    assert module.value_dim == 5 and variables["params"]["value"]["kernel"].shape == (7, 2, 5)
    with pytest.raises(
        WeightsError, match=r"Of weights in several shards, load the \.weights\.json"
    ):
        keras.load("m_0.weights.h5")
    pathlib.Path("m_0.weights.h5").rename("elsewhere")
    pathlib.Path("m_0.weights.h5").symlink_to("elsewhere")
    with pytest.raises(WeightsError, match=r"lists 'm_0\.weights\.h5', which is no .* beside it"):
        keras.load("m.weights.json")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_bytes_are_read_or_refused(tmp_path, compression):
    """In a process of its own, as HDF5 is a library in C."""
    program = """
import pathlib, sys
from mha_jax.errors import WeightsError
from mha_jax.interop import keras
from tests.drawn import damaged
for name in sys.argv[1:]:
    refused, good = 0, pathlib.Path(name).read_bytes()
    for data in damaged(good, 400):
        pathlib.Path("damaged").write_bytes(data)
        try:
            keras.load("damaged")
        except WeightsError:
            refused += 1
    assert refused > 100, refused
"""
    hdf5(path=tmp_path / "a.h5")
    (tmp_path / "b.keras").write_bytes(archive(compression=compression))
    command = [sys.executable, "-c", program, *["a.h5"][: compression == 0], "b.keras"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def npz(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def pairs(data):
    with reading("x.npz", "Expected pairs.", DataError):
        return npy_array(zip_parts(io.BytesIO(data), ["a.npy"])["a.npy"])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12).reshape(3, 4),
        np.arange(12, dtype=np.int16).reshape(3, 4).T,
        np.array(7.0),
        np.ones((0, 5), np.uint8),
    ],
)
def test_arrays_are_read_as_numpy_does(array):
    got = pairs(npz(a=array))
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype and got.shape == array.shape


def header(text):
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def alone(data):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.npy", data)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"not a zip file"),
        (b"\x93NUMPY", r"not a zip file"),
        (npz(b=np.ones(3)), r"it holds a\.npy 0 times, among b\.npy"),
        (npz(a=np.array([{}], object)), r"no numbers"),
        (npz(a=np.zeros(10**7)), r"a\.npy is said to grow from [\d,]+ bytes to 80,000,128"),
        (alone(b""), r"EOF|magic"),
        (
            alone(header("{'descr': '<i8', 'fortran_order': False, 'shape': (10**12,)}")),
            r"malformed",
        ),
        (
            alone(header("{'descr': '<i8', 'fortran_order': False, 'shape': (999999999999, 9)}")),
            r"said to be int64 \(999999999999, 9\), but has 0 bytes",
        ),
        (alone(header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}")), r"no numbers"),
        (alone(header("{'descr': 'x', 'fortran_order': False, 'shape': (1,)}")), r"descr"),
        (alone(header("{" * 90)), r"EOF|header"),
        (alone(b"\x93NUMPY\x09\x00" + bytes(99)), r"version"),
    ],
)
def test_damaged_arrays_are_named(data, message):
    with pytest.raises(DataError, match=rf"^x\.npz cannot be read: .*{message}.*Expected pairs\.$"):
        pairs(data)


def test_arrays_with_damaged_bytes_are_read_or_refused():
    good, refused = npz(a=np.arange(60).reshape(3, 20)), 0
    for data in damaged(good, 2000):
        try:
            assert pairs(data).nbytes <= INFLATION * len(data) + FREE
        except DataError:
            refused += 1
    assert refused > 1000


def test_a_byte_is_taken_once():
    budget = Budget(100)
    budget.take("a", 60, 60)
    with pytest.raises(
        DamageError, match=r"b is said to have 50 bytes, where 40 of the file's 100"
    ):
        budget.take("b", 50, 50)
    budget.take("b", 40 * INFLATION + FREE, 40, compressed=True)
    for declared, stored in ((1, 0), (-1, 0), (0, -1)):
        with pytest.raises(DamageError, match="is said to"):
            budget.take("c", declared, stored)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("It is full.\nMore.", "It is full"),
        ("", "ValueError"),
        ("a" * 300 + "b" * 150, "... " + "b" * 150),
        (
            "Error: No space [code='28'] [tensorstore_spec='{" + "x" * 999,
            "Error: No space [code='28']",
        ),
    ],
)
def test_the_reason_of_an_error_is_short(text, want):
    assert reason(ValueError(text)) == want
