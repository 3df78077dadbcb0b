"""Pictures have the labels they were given, and matplotlib is loaded for them alone."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from mha_jax.errors import ShapeError
from mha_jax.visualize import alignment


def scores(heads=3, rows=4, columns=5):
    drawn = np.random.default_rng(0).random((heads, rows, columns), np.float32)
    return drawn / drawn.sum(-1, keepdims=True)


@pytest.mark.parametrize("heads", [1, 3, 4, 7])
def test_picture_names_rows_columns_and_heads(tmp_path, heads):
    path = tmp_path / "map.svg"
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        alignment(
            scores(heads),
            path,
            queries=["AE", "K", "T", "end"],
            keys=list("cater"),
            query_name="phoneme",
            key_name="letter",
            title="cater: K EY T ER",
        )
    text = path.read_text()
    for label in ("cater: K EY T ER", "phoneme", "letter", "attention weight", ">AE<", ">r<"):
        assert label in text
    assert f"head {heads - 1}<" in text and f"head {heads}<" not in text


def test_a_png_is_written(tmp_path):
    alignment(scores(), tmp_path / "map.png", queries=list("abcd"), keys=list("vwxyz"))
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("shape", "queries", "keys"),
    [((3, 4, 5), "abc", "vwxyz"), ((3, 4, 5), "abcd", "vwxy"), ((4, 5), "abcd", "vwxyz")],
)
def test_labels_must_match(tmp_path, shape, queries, keys):
    with pytest.raises(ShapeError, match=r"Expected scores \[N, T, S\] with a label for every"):
        alignment(np.ones(shape), tmp_path / "map.png", queries=queries, keys=keys)
    assert not (tmp_path / "map.png").exists()


def test_importing_the_module_loads_no_matplotlib():
    code = "import sys, mha_jax.visualize; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
