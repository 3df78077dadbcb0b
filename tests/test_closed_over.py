"""Arrays of JAX that a program closes over: known while it is traced, though what is made of them is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax.models import bert, decoder, t5, transformer

TOKENS = jnp.asarray([[1, 2, 3, 4, 0], [5, 6, 7, 8, 9]])
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 2, 4)), jnp.float32)
ONE, COUNTS, FAR = jnp.int32(1), jnp.asarray([1, 0]), jnp.asarray([0, 7])
MODELS = {
    "decoder": decoder.CausalLM(decoder.Config(11, 8, 16, 2, layers=(decoder.Local(mj.Rotary()),))),
    "bert": bert.Bert(bert.Config(11, width=8, num_heads=2, hidden=16, layers=(0,))),
    "t5": t5.T5(t5.Config(11, 8, 16, 2, 4, 1, 1)),
    "language": transformer.LanguageModel(
        11, transformer.Config(width=8, num_heads=2, hidden=16, encoder_layers=1)
    ),
}
TRANSFORMS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": lambda f: lambda x: jax.vmap(f)(jax.tree.map(lambda a: a[None], x)),
    "scan": lambda f: lambda x: jax.lax.scan(lambda _, y: (None, f(x)), None, None, length=1)[1],
    "grad": lambda f: jax.grad(lambda x: sum(jnp.sum(a) for a in _floats(f(x)))),
}


def _floats(tree):
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_models_are_applied_to_tokens_that_a_program_closes_over(name, transform):
    inputs = (TOKENS,) * (2 if name == "t5" else 1)
    variables = MODELS[name].init(jax.random.key(0), *inputs)
    program = TRANSFORMS[transform](lambda v: MODELS[name].apply(v, *inputs))
    assert all(np.isfinite(a).all() for a in _floats(program(variables)))


CACHE = mj.Cache.empty(2, 5, 2, 4).append(X, X)
STACKED = mj.Cache.empty(2, 5, 2, 4, layers=3)
PACKED = mj.Tokens.packed(TOKENS // 3)
CALLS = {
    "truncated": lambda cache: cache.truncated(COUNTS),
    "reorder": lambda cache: cache.reorder(COUNTS),
    "of_layer": lambda cache: STACKED.of_layer(ONE).append(2 * X, X).all_layers(),
    "positions": lambda cache: cache.next_positions(1, jnp.ones((2, 1), bool)),
    "call": lambda cache: mj.dot_product_attention(
        *(X, X, X),
        mask=mj.SameSegment() & mj.PrefixLM(COUNTS),
        query_tokens=PACKED,
        key_tokens=PACKED,
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_what_is_closed_over_says_the_same(call):
    want, got = call(CACHE), jax.jit(call)(CACHE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), want, got)


def test_what_is_out_of_range_is_refused_there_too():
    with pytest.raises(mj.ShapeError, match="values from 0 to 7"):
        jax.jit(lambda cache: cache.reorder(FAR))(CACHE)
