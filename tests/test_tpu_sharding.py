"""Our kernels on many TPUs that are not there: each works on its shard, and nothing is gathered."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mha_jax import Call, Causal, Dropout
from mha_jax.attention.call import Output
from mha_jax.attention.check import check
from mha_jax.engine.derivative import Tiled
from mha_jax.sharding import Sharded
from tests.test_sharding import exchanges

pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
from mha_jax.backends.pallas_tpu import PallasTPU
from tests.topologies import chips

P = PartitionSpec


@pytest.mark.parametrize(
    ("names", "backend"),
    [
        (("data", "model"), Sharded()),
        (("x", "y"), Sharded()),
        (("b", "a"), Sharded(batch=("b",), heads=("a",))),
    ],
)
def test_kernels_are_cut_on_tpus_that_are_not_there(names, backend):
    backend = dataclasses.replace(backend, backend=Tiled(PallasTPU()))
    mesh = Mesh(chips("v5e:4x4").reshape(4, 4), names)
    place = NamedSharding(mesh, P(names[0], None, names[1]))

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)

    def function(q, k, v):
        call = check(Call(q, k, v, mask=Causal(), dropout=Dropout(jax.random.key(7), 0.3)))
        output = backend.forward(call)
        return output, backend.cotangent(call, output, Output(output.out, output.lse))

    arguments = shape(8, 256, 8, 64), shape(8, 256, 4, 64), shape(8, 256, 4, 64)
    program = jax.jit(function).lower(*arguments).compile()
    assert program.as_text().count("tpu_custom_call") == 2
    assert exchanges(program) == []
