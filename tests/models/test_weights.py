"""Weights are found, checked, renamed and transposed as described."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import WeightsError
from mha_jax.errors import InputError
from mha_jax.models.weights import fill, read_checked, read_safetensors

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


def test_safetensors_are_read_and_damage_is_named():
    safetensors = pytest.importorskip("safetensors.numpy")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = safetensors.save({"x": x})
    np.testing.assert_array_equal(read_safetensors(data)["x"], x)
    for damaged in (b"", data[:-1], data[:9], b"\xff" * 20):
        with pytest.raises(WeightsError, match="no safetensors file, or damaged"):
            read_safetensors(damaged)


def test_safetensors_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(WeightsError, match="pip install safetensors"):
        read_safetensors(b"")


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
