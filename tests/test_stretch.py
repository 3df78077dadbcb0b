"""A step of decoding reads the stretch of a cache that is seen, whatever is held where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Cache, Causal, Dropout, Tokens, Window, biases
from mha_jax.attention.check import check
from mha_jax.backends.blockwise import Blockwise, stretch
from tests.drawn import draw

B, C, N, K, H = 2, 2053, 4, 2, 5
KEYS, VALUES = draw(0, B, C, K, H), draw(1, B, C, K, H)
BIAS = draw(2, 1, N, 1, C)
CASES = {
    "few": ((3, 17), {}),
    "none": ((0, 0), {}),
    "one_row": ((0, 250), {}),
    "more": ((300, 5), {}),
    "full": ((C - 3, C - 3), {}),
    "window": ((C - 3, C - 9), {"mask": Causal() & Window(40, 0)}),
    "between": ((1030, 1000), {"mask": Causal() & Window(100, 0)}),
    "apart": ((C - 3, 60), {"mask": Causal() & Window(40, 0)}),
    "dropout": ((31, 99), {"dropout": Dropout(jax.random.key(0), 0.5)}),
    "array": ((31, 99), {"bias": BIAS}),
    "mask_array": ((31, 99), {"mask": BIAS > 0}),
    "rule": ((31, 99), {"bias": biases.Alibi.of_heads(N)}),
}


def held(counts):
    filled = np.arange(C)[None] < np.array(counts)[:, None]
    return Cache.empty(B, C, K, H).append(KEYS, VALUES, filled)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_stretch_gives_what_the_whole_gives(name, length):
    counts, options = CASES[name]
    q = draw(3, B, length, N, H)
    new = draw(4, B, length, K, H)
    if name in ("array", "mask_array"):
        options = {x: a[..., :C] for x, a in options.items()}

    def step(backend):
        call = jax.jit(
            lambda q, cache: mj.dot_product_attention(
                q, new, new, cache=cache, backend=backend, **options
            )[0]
        )
        return call(q, held(counts))

    got, want = step("blockwise"), step("reference")
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_gradients_and_mapped_steps():
    cache = held((20, 200))
    q = draw(3, B, 1, N, H)

    def loss(q, cache, backend=None):
        out = mj.dot_product_attention(q, None, None, cache=cache, backend=backend)[0]
        return (out**2).sum()

    got, want = (jax.grad(loss)(q, cache, name) for name in ("blockwise", "reference"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    one = jax.tree.map(lambda a: a[:, None], cache)
    mapped = jax.vmap(loss)(q[:, None], one)
    np.testing.assert_allclose(mapped.sum(), loss(q, cache), rtol=1e-5)


@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [(8192, [8192, 1024, 256]), (4096, [4096, 512]), (2048, [2048, 256]), (1024, [1024, 256])],
)
def test_what_is_copied_is_an_eighth_or_a_quarter_of_a_kibi(monkeypatch, capacity, sizes):
    seen = []

    def attend(problem):
        seen.append(problem.k.shape[1])
        return Blockwise(block_k=problem.k.shape[1]).forward(problem)

    cache = Cache.empty(B, capacity, K, H)
    tokens = cache.tokens
    assert isinstance(tokens, Tokens)
    k, v = (x.swapaxes(1, 2) for x in (cache.keys, cache.values))
    call = mj.Call(jnp.ones((B, 1, N, H)), k, v, None, tokens, mj.ValidKeys(), heads_first=True)

    def run(count):
        own = dataclasses.replace(tokens, valid=jnp.arange(capacity)[None] < count)
        return stretch.forward(check(dataclasses.replace(call, k_tokens=own)), attend)

    jax.make_jaxpr(run)(3)
    assert seen == sizes


def test_a_step_holds_no_more_than_its_cache():
    cache = jax.eval_shape(lambda: Cache.empty(2, 8192, 8, 64))
    q, new = (jax.ShapeDtypeStruct((2, 1, n, 64), jnp.float32) for n in (8, 8))

    def step(cache, q, new):
        return mj.dot_product_attention(q, new, new, mask=Causal(), cache=cache)

    compiled = jax.jit(step, donate_argnums=0).lower(cache, q, new).compile()
    used, size = compiled.memory_analysis(), 2 * 8192 * 8 * 64 * 4
    assert used is not None and used.temp_size_in_bytes < size / 2
    assert used.alias_size_in_bytes >= 2 * size
