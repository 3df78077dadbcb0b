"""Greedy decoding equals the definition: the likeliest next symbol, one full pass for each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.models.transformer import Config, LanguageModel, Transformer
from mha_jax.train.decoding import greedy
from mha_jax.train.lm import write_on

PAD, BEGIN, END, LENGTH = 0, 1, 2, 6


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
    apply = jax.jit(partial(model.apply, {"params": params}))
    told = [BEGIN]
    while len(told) <= LENGTH and told[-1] != END:
        padded = np.array([told + [PAD] * (LENGTH + 1 - len(told))], np.int32)
        logits = np.array(apply(source, padded)[0, len(told) - 1])
        logits[[PAD, BEGIN]] = -np.inf
        told.append(int(logits.argmax()))
    return told[1:] + [PAD] * (LENGTH + 1 - len(told))


def test_greedy_equals_the_definition(speller):
    model, params, source = speller
    got = greedy(model, params, source, length=LENGTH, begin=BEGIN, end=END)
    want = [by_hand(model, params, row) for row in source]
    np.testing.assert_array_equal(got, want)
    assert len({tuple(row) for row in want}) == 3 and want[0][0] == END


def test_answers_do_not_depend_on_their_company(speller):
    model, params, source = speller
    alone = greedy(model, params, source[1:2], length=LENGTH, begin=BEGIN, end=END)
    together = greedy(model, params, source, length=LENGTH, begin=BEGIN, end=END)
    np.testing.assert_array_equal(alone[0], together[1])


def test_writing_on_keeps_what_was_written_and_repeats_itself():
    config = Config(width=8, num_heads=2, hidden=12, encoder_layers=1, sliding_window=3)
    model, begun = LanguageModel(11, config), np.array([[4, 7, 9]], np.int32)
    params = jax.jit(model.init)(jax.random.key(0), begun)["params"]
    one, same = (write_on(model, params, begun, 5, jax.random.key(1)) for _ in range(2))
    np.testing.assert_array_equal(one[:, :3], begun)
    np.testing.assert_array_equal(one, same)
    cold = write_on(model, params, begun, 1, jax.random.key(1), temperature=1e-6)
    logits = jax.jit(model.apply)({"params": params}, jnp.pad(begun, ((0, 0), (0, 1))))
    assert int(cold[0, 3]) == int(logits[0, 2].argmax())
