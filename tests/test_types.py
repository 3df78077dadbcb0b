"""What type checkers make of a user's program: what calls return, and every misspelt name."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Lines that are wrong say so.
PROGRAM = """
from typing import Any, assert_type

import jax
import mha_jax as mj
from flax import nnx

Both = tuple[jax.Array, jax.Array]


def function(params: Any, x: jax.Array, cache: mj.Cache, scores: bool) -> None:
    call = mj.multi_head_attention
    assert_type(call(params, x, x), jax.Array)
    assert_type(call(params, x, x, use_causal_mask=True, qk_norm="rms"), jax.Array)
    assert_type(call(params, x, x, return_attention_scores=True), Both)
    assert_type(call(params, x, None, cache=cache), tuple[jax.Array, mj.Cache])
    assert_type(
        call(params, x, x, cache=cache, return_attention_scores=True),
        tuple[jax.Array, jax.Array, mj.Cache],
    )
    call(params, x, x, x, None, return_attention_scores=scores)
    call(params, x, x, is_causal=True)  # wrong
    assert_type(mj.dot_product_attention(x, x, x, mask=mj.Causal() & mj.Window(2, 0)), jax.Array)
    assert_type(mj.dot_product_attention(x, None, None, cache=cache), tuple[jax.Array, mj.Cache])


def layers(x: jax.Array, cache: mj.Cache) -> None:
    linen = mj.MultiHeadAttention(2, key_dim=8, dropout=0.1)
    assert_type(linen(x, x, training=True), jax.Array)
    assert_type(linen(x, x, return_attention_scores=True, value_mask=x), Both)
    assert_type(linen(x, x, cache=cache), tuple[jax.Array, mj.Cache])
    linen(x, x, deterministic=True)  # wrong
    linen(x, x, rngs=nnx.Rngs(0))  # wrong
    layer = mj.nnx.MultiHeadAttention(2, 8, in_features=16, rngs=nnx.Rngs(0))
    assert_type(layer(x, x, rngs=nnx.Rngs(1)), jax.Array)
    assert_type(layer(x, x, return_attention_scores=True), Both)
    layer(x, x, causal=True)  # wrong
    layer(x)  # wrong


def rooms() -> None:
    config = mj.models.bert.Config(width=8, num_heads=2)
    mj.Casual()  # wrong
    mj.models.bart  # wrong
    mj.train.workdir.open_workdirs  # wrong
    config.widht  # wrong
"""
WRONG = {n for n, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}


def check_by_pyright(folder):
    settings = {"extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    command += ["--outputjson", "user.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    errors = json.loads(done.stdout)["generalDiagnostics"]
    return {e["range"]["start"]["line"] + 1 for e in errors if e["severity"] == "error"}, errors


def check_by_mypy(folder):
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports"]
    done = subprocess.run(
        [*command, "--strict", "user.py"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    return {int(n) for n in re.findall(r"^user\.py:(\d+): error", done.stdout, re.M)}, done.stdout


@pytest.mark.parametrize(
    ("checker", "check"), [("pyright", check_by_pyright), ("mypy", check_by_mypy)]
)
def test_types_hold_and_every_typo_is_found(checker, check, tmp_path):
    pytest.importorskip(checker)
    (tmp_path / "user.py").write_text(PROGRAM)
    found, said = check(tmp_path)
    assert found == WRONG, said
