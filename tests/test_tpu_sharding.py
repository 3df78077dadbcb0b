"""Our kernels on many TPUs that are not there: each works on its shard, and nothing is gathered."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mha_jax import Call, Causal, Dropout, attend
from mha_jax.sharding import Sharded
from tests.test_sharding import exchanges

pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
from tests.topologies import chips

P = PartitionSpec


NAMED, GIVEN = Sharded(), Sharded(batch=("b",), heads=("a",))


@pytest.mark.parametrize(
    ("names", "backend", "kinds", "exchanged"),
    [
        (("data", "model"), NAMED, "Auto", set()),
        (("b", "a"), GIVEN, "Auto", set()),
        # What names without a meaning cut is not guessed: every device computes the whole.
        (("x", "y"), NAMED, "Auto", {"all-gather"}),
        (("x", "y"), NAMED, "Explicit", set()),
    ],
)
def test_kernels_are_cut_on_tpus_that_are_not_there(names, backend, kinds, exchanged):
    mesh = Mesh(chips("v5e:4x4").reshape(4, 4), names, axis_types=(getattr(AxisType, kinds),) * 2)
    place = NamedSharding(mesh, P(names[0], None, names[1]))

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)

    def function(q, k, v):
        def out(q, k, v):
            dropout = Dropout(jax.random.key(7), 0.3)
            return attend(Call(q, k, v, mask=Causal(), dropout=dropout), backend).out

        out, cotangents = jax.vjp(out, q, k, v)
        return out, cotangents(out)

    arguments = shape(8, 256, 8, 64), shape(8, 256, 4, 64), shape(8, 256, 4, 64)
    program = jax.jit(function).lower(*arguments).compile()
    assert program.as_text().count("tpu_custom_call") == 2
    assert set(exchanges(program)) == exchanged
