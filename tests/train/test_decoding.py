"""Greedy decoding equals the definition, one full pass for each symbol; a beam finds the best."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.errors import ShapeError
from mha_jax.models.decoder import CausalLM
from mha_jax.models.transformer import Config, LanguageModel, Transformer
from mha_jax.train.decoding import beam_search, greedy
from mha_jax.train.lm import write_on
from mha_jax.train.modern import Modern

PAD, BEGIN, END, LENGTH = 0, 1, 2, 6
MARKS = {"length": LENGTH, "begin": BEGIN, "end": END}


@pytest.fixture(scope="module")
def speller():
    """A model, drawn so that its three answers differ and one is at once at its end."""
    sizes = {"hidden": 12, "encoder_layers": 1, "decoder_layers": 1, "norm_first": True}
    config = Config(width=8, num_heads=2, **sizes)
    model = Transformer(7, 11, config)
    source = np.array([[3, 5, 2, 9, 4], [7, 1, 0, 0, 0], [2, 2, 2, 0, 0]], np.int32)
    params = jax.jit(model.init)(jax.random.key(34), source, source)["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 4 * x if "kernel" in jax.tree_util.keystr(path) else x, params
    )
    return model, params, source


def by_hand(model, params, row):
    """Decode one source by the definition, its padding cut off."""
    source = row[row != PAD][None]
    told = [BEGIN]
    while len(told) <= LENGTH and told[-1] != END:
        padded = np.array([told + [PAD] * (LENGTH + 1 - len(told))], np.int32)
        logits = np.array(full_pass(model, params, source, padded)[0, len(told) - 1])
        logits[[PAD, BEGIN]] = -np.inf
        told.append(int(logits.argmax()))
    return told[1:] + [PAD] * (LENGTH + 1 - len(told))


@partial(jax.jit, static_argnums=0)
def full_pass(model, params, source, shifted):
    return model.apply({"params": params}, source, shifted, source != PAD)


def log_probabilities(model, params, source, targets):
    """Return log P of targets [B, L] for their sources [B, S], by one full pass."""
    shifted = np.concatenate([np.full((len(targets), 1), BEGIN), targets[:, :-1]], axis=1)
    logits = full_pass(model, params, source, shifted)
    steps = jax.nn.log_softmax(logits.at[:, :, jnp.array([PAD, BEGIN])].set(-jnp.inf))
    steps = np.take_along_axis(np.asarray(steps, np.float64), targets[:, :, None], axis=2)[:, :, 0]
    return np.where(targets == PAD, 0, steps).sum(axis=1)


def normalised(scores, targets, penalty):
    return scores / ((5 + (targets != PAD).sum(axis=1)) / 6) ** penalty


def test_greedy_equals_the_definition(speller):
    model, params, source = speller
    got = greedy(model, params, source, **MARKS)
    want = [by_hand(model, params, row) for row in source]
    np.testing.assert_array_equal(got, want)
    assert len({tuple(row) for row in want}) == 3 and want[0][0] == END


@pytest.mark.parametrize("decode", [greedy, lambda *a, **k: beam_search(*a, **k, beam=2)[0]])
def test_answers_do_not_depend_on_their_company(speller, decode):
    model, params, source = speller
    together = decode(model, params, source, **MARKS)
    for row, answer in zip(source, np.asarray(together)):
        np.testing.assert_array_equal(decode(model, params, row[None], **MARKS)[0], answer)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 3.0])
def test_a_beam_of_one_is_greedy(speller, penalty):
    model, params, source = speller
    want = np.asarray(greedy(model, params, source, **MARKS))
    options = {"beam": 1, "length_penalty": penalty}
    got, scores = beam_search(model, params, source, **MARKS, **options)
    np.testing.assert_array_equal(got, want)
    plain = log_probabilities(model, params, source, want)
    np.testing.assert_allclose(scores, normalised(plain, want, penalty), rtol=1e-4)


def every_target(symbols, length):
    """Return every target of at most `length` symbols as rows: ended, or cut off at the length."""
    rows = []
    for count in range(length):
        for body in itertools.product(symbols, repeat=count):
            rows.append([*body, END] + [PAD] * (length - count - 1))
    rows += [list(body) for body in itertools.product(symbols, repeat=length)]
    return np.array(rows, np.int32)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_targets(speller, penalty):
    """Two symbols beside the end, four places: 31 targets, all inside a beam of 31."""
    _, params, source = speller
    model = Transformer(5, 11, speller[0].config)
    table = params["target_embedding"]["table"]["embedding"][:5]
    params = params | {"target_embedding": {"table": {"embedding": table}}}
    targets = every_target([3, 4], 4)
    assert len(targets) == 31
    short = {"length": 4, "begin": BEGIN, "end": END}
    got, scores = beam_search(model, params, source, **short, beam=31, length_penalty=penalty)
    chosen = np.asarray(greedy(model, params, source, **short))
    for row, answer, score, plain in zip(source, np.asarray(got), scores, chosen):
        sources = np.repeat(row[None], len(targets), 0)
        all_scores = log_probabilities(model, params, sources, targets)
        all_scores = normalised(all_scores, targets, penalty)
        np.testing.assert_allclose(score, all_scores.max(), rtol=1e-4)
        np.testing.assert_array_equal(answer, targets[all_scores.argmax()])
        own = all_scores[(targets == plain).all(axis=1)]
        assert len(own) == 1 and score >= own[0] - 1e-5


def test_a_narrow_beam_scores_what_it_returns(speller):
    model, params, source = speller
    got, scores = beam_search(model, params, source, **MARKS, beam=3, length_penalty=0.6)
    got = np.asarray(got)
    want = normalised(log_probabilities(model, params, source, got), got, 0.6)
    np.testing.assert_allclose(scores, want, rtol=1e-4)
    for row in got:
        ended = np.flatnonzero(row == END)
        assert not np.any(row[ended[0] + 1 :]) if len(ended) else np.all(row > END)


def test_wrong_beams_are_refused(speller):
    model, params, source = speller
    for beam in (0, -1, 2.0, True):
        with pytest.raises(ShapeError, match=r"beam must be a positive integer.*1 is greedy"):
            beam_search(model, params, source, **MARKS, beam=beam)
    with pytest.raises(ShapeError, match=r"length_penalty must be a number from 0: got -0\.5"):
        beam_search(model, params, source, **MARKS, length_penalty=-0.5)


TRANSFORMER = Config(width=8, num_heads=2, hidden=12, encoder_layers=1, sliding_window=3)
# Its caches hold two tokens, fewer than it is given to begin with.
ROLLING = Modern(width=8, num_heads=2, num_kv_heads=1, hidden=12, layers=2, window=2, qk_norm="rms")


@pytest.mark.parametrize(
    "model",
    [
        LanguageModel(11, TRANSFORMER),
        CausalLM(ROLLING.decoder(11)),
        # Its window is longer than any text: caches hold the text alone.
        CausalLM(dataclasses.replace(ROLLING, window=2**30).decoder(11)),
    ],
    ids=["lm", "decoder", "far"],
)
def test_writing_on_is_the_whole_model_again_and_again(model):
    """Cold, it takes the most probable character at every place; warm, the key decides."""
    begun = np.array([[4, 7, 9], [1, 2, 10]], np.int32)
    params = jax.jit(model.init)(jax.random.key(0), begun)["params"]
    one, same = (write_on(model, params, begun, 5, jax.random.key(1)) for _ in range(2))
    np.testing.assert_array_equal(one[:, :3], begun)
    np.testing.assert_array_equal(one, same)
    assert np.any(one != write_on(model, params, begun, 5, jax.random.key(2)))
    cold = write_on(model, params, begun, 5, jax.random.key(1), temperature=1e-6)
    logits = jax.jit(model.apply)({"params": params}, cold)
    np.testing.assert_array_equal(cold[:, 3:], logits[:, 2:-1].argmax(-1))
