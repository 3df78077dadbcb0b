"""The TPU kernels drop the weights that every backend drops: `Dropout` and `SharedDropout` alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import Call, Causal, Dropout, Tokens, attend
from mha_jax.attention.attention_fn import SharedDropout
from mha_jax.attention.call import Output
from mha_jax.attention.check import check
from tests.cases import COLUMNS, ROWS, Case
from tests.test_pallas_tpu import SMALL, assert_as_good_as_reference, errors_of, run

B, T, S, N, RATE = 2, 131, 149, 4, 0.4
KINDS = pytest.mark.parametrize("kind", [Dropout, SharedDropout], ids=lambda kind: kind.__name__)


@dataclasses.dataclass(frozen=True)
class SharedCase(Case):
    """A case whose examples and heads all drop the same weights."""

    @property
    def dropout(self):
        return SharedDropout(jax.random.key(7), self.rate, batch_start=3, head_start=5)


def bits(kind):
    """Return a call of even weights with rows of its own in each example, and its keep bits."""
    dropout = kind(jax.random.key(3), RATE, batch_start=5, head_start=7)
    rows = np.stack([np.arange(T), np.arange(T) + 11]).astype(np.int32)
    keep = dropout.keep(B, N, rows, np.arange(S, dtype=np.int32)[None])
    q, k = jnp.zeros((B, T, N, 3)), jnp.zeros((B, S, N // 2, 3))
    v = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, N // 2, S))
    call = Call(q, k, v, q_tokens=Tokens(T, index=rows), dropout=dropout)
    return call, np.asarray(keep)


@KINDS
def test_the_weights_kept_are_those_of_the_stream(kind):
    call, keep = bits(kind)
    assert bool((keep == keep[:, :1]).all()) == (kind is SharedDropout)
    outs = [np.asarray(attend(call, backend).out) for backend in (SMALL, "blockwise", "reference")]
    for out in outs:
        np.testing.assert_array_equal(out.transpose(0, 2, 1, 3) > 0, keep)
        np.testing.assert_allclose(out[out > 0], 1 / (S * (1 - RATE)), rtol=1e-5)


@KINDS
def test_the_weights_kept_are_those_of_the_stream_in_the_backward_pass(kind):
    call, keep = bits(kind)
    call = check(dataclasses.replace(call, v=jnp.ones((B, S, N // 2, T))))
    d_out = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, N, T))
    state = SMALL.forward(call)
    d_v = SMALL.cotangent(call, state, Output(d_out, jnp.zeros_like(state.l))).v
    # Two query heads a key head: how many of the two kept the weight of a query, for every key.
    kept = keep.reshape(B, N // 2, 2, T, S).sum(2).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(np.rint(d_v * S * (1 - RATE)), kept)


@pytest.mark.parametrize(
    "case",
    [
        SharedCase("shared_dropout", rate=0.4),
        SharedCase(
            "shared_dropout_causal_bias", Causal(), COLUMNS <= ROWS, bias=(1, 6, 37, 53), rate=0.2
        ),
    ],
    ids=lambda case: case.name,
)
def test_shared_dropout_agrees_with_the_oracle(case):
    assert_as_good_as_reference(errors_of(run(SMALL, case), case), case)
