"""Weights are found, checked, renamed and transposed as described."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import WeightsError
from mha_jax.errors import InputError
from mha_jax.models.weights import _SAFETENSORS, fill, read_checked, read_safetensors
from tests.drawn import damaged

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package called `numbers_of` with the file `data/w.bin`, never imported."""
    (tmp_path / "numbers_of" / "data").mkdir(parents=True)
    (tmp_path / "numbers_of" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "numbers_of" / "data" / "w.bin").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_file_is_read_without_importing_its_package(package):
    assert read_checked("numbers_of", "data/w.bin", EMPTY, "numbers-of==1") == b""
    assert "numbers_of" not in sys.modules


@pytest.mark.parametrize(
    ("name", "file", "sha256", "message"),
    [
        ("none_of", "data/w.bin", EMPTY, r"none_of, which holds data/w\.bin, is not installed"),
        ("numbers_of", "data/no.bin", EMPTY, r"numbers_of has no file .*no\.bin"),
        ("numbers_of", "data/w.bin", "abc", rf"sha256 {EMPTY}, expected abc: another version"),
    ],
)
def test_wrong_packages_are_named(package, name, file, sha256, message):
    with pytest.raises(WeightsError, match=message + r".*pip install numbers-of==1"):
        read_checked(name, file, sha256, "numbers-of==1")


def test_the_error_may_be_another(package):
    with pytest.raises(InputError, match="is not installed"):
        read_checked("none_of", "x", EMPTY, "none", InputError)


def pack(header, numbers=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", list(_SAFETENSORS))
def test_safetensors_of_every_dtype(dtype):
    item = np.dtype(_SAFETENSORS[dtype]).itemsize
    one, other = entry(dtype, [2, 3], 0, 6 * item), entry("U8", [], 6 * item, 6 * item + 1)
    numbers = bytes(range(6 * item)) if dtype != "BOOL" else b"\0\1\1\0\0\1"
    got = read_safetensors(pack({"__metadata__": {"a": "b"}, "x": one, "y": other}, numbers + b"z"))
    assert list(got) == ["x", "y"] and got["x"].shape == (2, 3) and got["y"] == ord("z")
    assert got["x"].dtype == np.dtype(_SAFETENSORS[dtype]) and got["x"].tobytes() == numbers


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32", "uint8", "bool"])
def test_safetensors_as_the_package_writes_them(dtype):
    safetensors = pytest.importorskip("safetensors.numpy")
    given = {"x": np.arange(6).reshape(2, 3).astype(dtype), "none": np.ones((0, 5), dtype)}
    got = read_safetensors(safetensors.save(given))
    for name, array in given.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype


def test_safetensors_of_bfloat16_as_torch_writes_them():
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save
    x = torch.arange(6.0).reshape(2, 3) / 7
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        got = read_safetensors(save({"x": x.to(dtype)}))["x"]
        np.testing.assert_array_equal(got.astype(np.float32), x.to(dtype).float().numpy())


GIANT = entry("F32", [2**40], 0, 2**42)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"its header ends at byte 8 of 0"),
        (b"\xff" * 20, r"its header ends at byte 18,446,744,073,709,551,623 of 20"),
        (pack(b"{"), r"Expecting property name"),
        (pack(b"[" * 100_000), r"recursion"),
        (pack(b"[]"), r"its JSON is a list, not an object"),
        (pack(b'{"x": 1, "x": 2}'), r"a name is there twice"),
        (pack(b"\xff\xfe"), r"utf-8"),
        (pack({"x": 3}), r"not subscriptable"),
        (pack({"x": {}}), r"dtype"),
        (pack({"x": entry("F4", [2], 0, 1)}, b"1"), r"x has dtype F4, where F64, .*BF16"),
        (pack({"x": GIANT}), r"from 0 to 4398046511104 of 0 bytes"),
        (
            pack({"x": entry("F32", [2], 0, 4)}, b"1234"),
            r"x of shape \[2\] and dtype F32 lies from",
        ),
        (pack({"x": entry("U8", [-1], 0, -1)}), r"x has shape \[-1\] and places 0 to -1"),
        (pack({"x": entry("U8", [1.0], 0, 1)}, b"1"), r"x has shape \[1\.0\]"),
        (pack({"x": entry("U8", [1] * 70, 0, 1)}, b"1"), r"dimension"),
        (pack({"x": entry("U8", [1], 1, 2)}, b"12"), r"overlap, or leave bytes between"),
        (pack({"x": entry("U8", [1], 0, 1)}, b"12"), r"overlap, or leave bytes between"),
        (
            pack({"x": entry("U8", [2], 0, 2), "y": entry("U8", [2], 1, 3)}, b"123"),
            r"overlap, or leave bytes between",
        ),
    ],
)
def test_damaged_safetensors_are_named(data, message):
    with pytest.raises(WeightsError, match=rf"safetensors file cannot be read: .*{message}.*again"):
        read_safetensors(data)


def test_safetensors_with_damaged_bytes_are_read_or_refused():
    good = pack({"x": entry("F32", [2, 3], 0, 24), "y": entry("BF16", [4], 24, 32)}, bytes(32))
    refused = 0
    for data in damaged(good, 3000):
        try:
            assert sum(x.nbytes for x in read_safetensors(data).values()) <= len(data)
        except WeightsError:
            refused += 1
    assert refused > 1500


SHAPES = {
    "embed": {"embedding": (7, 6)},
    "layer_11": {
        "norm": {"scale": (6,), "bias": (6,)},
        "query": {"kernel": (6, 2, 5), "bias": (2, 5)},
        "attention_output": {"kernel": (2, 5, 6), "bias": (6,)},
        "dense": {"kernel": (6, 3)},
    },
}
NAMES = {
    "embed": "words",
    "layer_{i}/norm": "h.{i}.LayerNorm",
    "layer_{i}/query": "h.{i}.q",
    "layer_{i}/attention_output": "h.{i}.o",
    "layer_{i}/dense": "h.{i}.d",
}


def shapes():
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def tensors():
    draw = np.random.default_rng(0).standard_normal
    sizes = {
        "words.weight": (7, 6),
        "h.11.LayerNorm.weight": (6,),
        "h.11.LayerNorm.bias": (6,),
        "h.11.q.weight": (10, 6),
        "h.11.q.bias": (10,),
        "h.11.o.weight": (6, 10),
        "h.11.o.bias": (6,),
        "h.11.d.weight": (3, 6),
        "pooler.weight": (6, 6),
    }
    return {f"bert.{name}": draw(size).astype(np.float32) for name, size in sizes.items()}


def test_parameters_compute_what_torch_does():
    theirs = tensors()
    ours = jax.tree.map(np.asarray, fill(shapes(), NAMES, theirs, prefix="bert."))
    layer = ours["layer_11"]
    np.testing.assert_array_equal(ours["embed"]["embedding"], theirs["bert.words.weight"])
    np.testing.assert_array_equal(layer["norm"]["scale"], theirs["bert.h.11.LayerNorm.weight"])
    x = np.random.default_rng(1).standard_normal((4, 6))
    heads = np.einsum("bd,dnh->bnh", x, layer["query"]["kernel"]) + layer["query"]["bias"]
    want = x @ theirs["bert.h.11.q.weight"].T + theirs["bert.h.11.q.bias"]
    np.testing.assert_allclose(heads.reshape(4, 10), want, rtol=1e-5)
    out = np.einsum("bnh,nhd->bd", heads, layer["attention_output"]["kernel"])
    np.testing.assert_allclose(out, want @ theirs["bert.h.11.o.weight"].T, rtol=1e-4)
    np.testing.assert_array_equal(layer["dense"]["kernel"], theirs["bert.h.11.d.weight"].T)


def test_a_missing_tensor_is_named():
    theirs = tensors()
    del theirs["bert.h.11.q.bias"]
    with pytest.raises(
        WeightsError, match=r"no tensor bert\.h\.11\.q\.bias, which layer_11/query/bias"
    ):
        fill(shapes(), NAMES, theirs, prefix="bert.")


@pytest.mark.parametrize("name", ["words.weight", "h.11.o.weight", "h.11.q.bias"])
def test_weights_of_the_wrong_shape_are_named(name):
    theirs = tensors()
    theirs[f"bert.{name}"] = theirs[f"bert.{name}"].T[..., :-1]
    with pytest.raises(WeightsError, match=rf"bert\.{name} has shape .* of shape .* needs \("):
        fill(shapes(), NAMES, theirs, prefix="bert.")
