"""The pass for few queries agrees with the oracle on every case, whatever its size."""

import jax
import numpy as np
import pytest

from mha_jax.backends import few_rows
from mha_jax.backends.reference import Reference
from mha_jax.checks import check
from tests import oracles
from tests.cases import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_few_rows_agrees_with_the_oracle(case):
    q, k, v, options = case.plain()
    out, lse, _ = oracles.attention(q, k, v, **options)
    call = check(case.call())
    own, plain = jax.jit(few_rows.forward)(call), jax.jit(Reference().forward)(call)
    epsilon = np.finfo(np.float32).eps
    for got, other, want in ((own.out, plain.out, out), (own.lse, plain.lse, lse)):
        allowed = max(2 * oracles.relative_error(other, want), epsilon)
        assert oracles.relative_error(got, want) <= allowed


def test_a_decoding_step_takes_it_and_a_long_call_does_not():
    def call(length):
        case = next(case for case in CASES if case.name == "causal")
        whole = check(case.call())
        return jax.tree.map(lambda a: a, check(type(whole)(whole.q[:, :length], whole.k, whole.v)))

    assert few_rows.worthwhile(call(1))
    assert not few_rows.worthwhile(call(37))
