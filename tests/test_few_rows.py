"""The pass for few queries agrees with the oracle on every case, whatever its size."""

import dataclasses

import jax
import numpy as np
import pytest

from mha_jax.attention import softmax
from mha_jax.attention.call import Call, Output
from mha_jax.attention.check import check
from mha_jax.backends.blockwise import Blockwise, few_rows
from mha_jax.backends.reference import Reference
from tests import oracles
from tests.cases import CASES


def output(state):
    return Output(state.out, softmax.logsumexp(state.m, state.l))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_few_rows_agrees_with_the_oracle(case):
    q, k, v, options = case.plain()
    out, lse, _ = oracles.attention(q, k, v, **options)
    call = check(case.call())
    own, plain = (output(jax.jit(f)(call)) for f in (few_rows.forward, Reference().forward))
    epsilon = np.finfo(np.float32).eps
    for got, other, want in ((own.out, plain.out, out), (own.lse, plain.lse, lse)):
        allowed = max(2 * oracles.relative_error(other, want), epsilon)
        assert oracles.relative_error(got, want) <= allowed


@pytest.mark.parametrize(
    ("b", "t", "s", "taken"),
    [(1, 1, 4096, True), (1, 4, 513, True), (1, 5, 4096, False), (1, 1, 512, False)]
    + [(64, 1, 128, True), (63, 1, 128, False)],
)
def test_few_queries_to_many_keys_take_it(b, t, s, taken):
    """Many are a long sequence, or a batch whose keys no cache of the processor holds."""
    q, k = (jax.ShapeDtypeStruct((b, length, 8, 32), np.float32) for length in (t, s))
    call = jax.eval_shape(lambda q, k: check(Call(q, k, k)), q, k)
    assert few_rows.worthwhile(call) is taken
    assert not few_rows.worthwhile(dataclasses.replace(call, heads_first=True))


@pytest.mark.parametrize(("t", "s", "tile"), [(1, 4096, (6, 4096)), (17, 4096, (3, 512))])
def test_a_step_from_a_cache_is_one_tile(t, s, tile):
    """Of a longer cache it is many, so that those that hold nothing can be skipped."""
    q, k = (jax.ShapeDtypeStruct((2, length, 3, 8), np.float32) for length in (t, s))
    call = jax.eval_shape(lambda q, k: check(Call(q, k, k, heads_first=True)), q, k)
    tiling = Blockwise().tiling(call)
    assert (tiling.layout.pairs, tiling.block_k) == tile
    long = jax.ShapeDtypeStruct((2, 2 * 8192, 3, 8), np.float32)
    call = jax.eval_shape(lambda q, k: check(Call(q, k, k, heads_first=True)), q, long)
    assert Blockwise().tiling(call).block_k == 512
