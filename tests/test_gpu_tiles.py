"""The tiles that a GPU is given: few and large, without loops, in bfloat16, and as right as the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import Call, Causal, SameSegment, Tokens, Window, attend
from mha_jax.attention.check import check
from mha_jax.backends.blockwise import CPU, GPU, Blockwise, Tuning
from mha_jax.backends.blockwise.tiles import Tiles
from mha_jax.backends.reference import Reference
from tests import oracles
from tests.cases import CASES
from tests.test_backends import BACKWARD, FORWARD, run, truth

NAMES = ("packed_causal", "dropout_causal", "bias_dense")


def multiples(backend, name, dtype):
    """Return the errors of out, lse and the gradients, and those that are allowed, by name."""
    (case,) = (case for case in CASES if case.name == name)

    def named(found):
        (out, lse), gradients = found
        return {"out": out, "lse": lse} | {f"d{key}": x for key, x in gradients.items()}

    wanted = named(truth(case, dtype))
    own, plain = (named(run(x, case, dtype)) for x in (backend, Reference()))
    for key, want in wanted.items():
        multiple = FORWARD if key in ("out", "lse") else BACKWARD
        error, least = (oracles.relative_error(x[key], want) for x in (own, plain))
        yield key, error, multiple * least


@pytest.mark.parametrize("name", NAMES)
def test_products_in_bfloat16_are_as_right_as_bfloat16_can_be(name):
    for key, error, allowed in multiples(Blockwise(16, 8, tuning=GPU), name, jnp.bfloat16):
        assert error <= allowed, key


# Written out one after the other: what a row sees of several tiles is put together at its end.
WRITTEN = {"nothing": 6, "some_rows_nothing": 1, "bias_minus_infinity": 6, "soft_cap": 1}


@pytest.mark.parametrize(("name", "pairs"), WRITTEN.items())
def test_tiles_without_loops_agree_with_the_oracle(name, pairs):
    (case,) = (case for case in CASES if case.name == name)
    backend = Blockwise(16, 8, pairs=pairs, tuning=GPU)
    problem = check(case.call())
    assert Tiles(problem, backend.tiling(problem)).written
    for key, error, allowed in multiples(backend, name, jnp.float32):
        assert error <= max(allowed, float(jnp.finfo(jnp.float32).eps)), key


def test_tiles_without_loops_keep_a_nan_where_it_is_seen():
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((1, 37, 2, 8)), jnp.float32) for _ in "qkvd")
    backend = Blockwise(16, 8, tuning=GPU)

    def passes(k, v):
        out, pull = jax.vjp(lambda *a: attend(Call(*a, mask=Causal()), backend).out, q, k, v)
        return out, *pull(d_out.at[:, 30:].set(0))

    clean = passes(k, v)
    bad = passes(k.at[:, 30].set(jnp.nan), v.at[:, 33].set(jnp.inf))
    assert bool(jnp.isnan(bad[0][:, 30:]).all())
    assert bool(jnp.all(bad[0][:, :30] == clean[0][:, :30]))
    for own, other in zip(bad[1:], clean[1:]):
        assert bool(jnp.all(own == other))


def test_many_tiles_are_looped_over_and_so_are_those_that_data_choose():
    def written(**options):
        x = jnp.zeros((1, 192, 2, 8))
        problem = check(Call(x, x, x, **options))
        return Tiles(problem, Blockwise(16, 16, tuning=GPU).tiling(problem)).written

    assert written(mask=Causal() & Window(20, 0))
    assert not written(mask=Causal())  # 78 tiles
    assert not written(
        mask=SameSegment(),
        q_tokens=Tokens(192, segment=jnp.zeros((1, 192), jnp.int32)),
        k_tokens=Tokens(192, segment=jnp.zeros((1, 192), jnp.int32)),
    )


def dots_in_bfloat16(dtype, **options):
    """Return how many products of a program for CUDA have two bfloat16 operands, and how many others."""
    x = jax.ShapeDtypeStruct((1, 64, 2, 12), dtype)

    def both(q, k, v):
        out, pull = jax.vjp(lambda *a: attend(Call(*a, logit_cap=9.0, **options)).out, q, k, v)
        return pull(out)

    text = jax.jit(both).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    halves = sum(line.rsplit(" : (", 1)[1].split(" -> ")[0].count("bf16") == 2 for line in lines)
    return halves, len(lines) - halves


def test_tensor_cores_get_halves_where_the_inputs_are_and_nobody_asks_for_more():
    assert dots_in_bfloat16(jnp.bfloat16) == (7, 0)
    assert dots_in_bfloat16(jnp.float32) == (0, 7)
    assert dots_in_bfloat16(jnp.bfloat16, precision="highest")[0] < 7


def tiles_of(tuning, b, t, n, kv, mask=None):
    q, k = jnp.zeros((b, t, n, 8), jnp.bfloat16), jnp.zeros((b, t, kv, 8), jnp.bfloat16)
    problem = check(Call(q, k, k, mask=mask or Causal()))
    return Tiles(problem, Blockwise(tuning=tuning).tiling(problem))


def turns(tiles):
    """Return how many tiles are visited one after the other."""
    order = tiles.visits(by_rows=True)
    return tiles.layout.groups * int(order.live.sum()) // (1 if tiles.written else len(order.live))


@pytest.mark.parametrize(
    ("shape", "on_cpu", "on_gpu"),
    [
        ((1, 4096, 16, 16), 288, 10),
        ((8, 4096, 16, 4), 2304, 80),
        ((1, 16384, 1, 1), 528, 10),
        ((8, 512, 8, 8), 32, 1),
    ],
)
def test_a_gpu_is_given_few_tiles(shape, on_cpu, on_gpu):
    assert turns(tiles_of(CPU, *shape)) == on_cpu
    tiles = tiles_of(GPU, *shape)
    assert turns(tiles) == on_gpu
    weights = tiles.layout.pairs * tiles.groups * tiles.tiling.block_q * tiles.tiling.block_k
    assert weights <= 2**24


def test_the_platform_lowered_for_chooses_the_sizes():
    x = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)
    function = jax.jit(lambda q, k, v: attend(Call(q, k, v)).out)
    for platform, side in {"cuda": 1024, "rocm": 1024, "cpu": 512}.items():
        text = function.trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()
        assert f"tensor<2x{side}x{side}xf32>" in text, platform


def test_sizes_that_are_given_stay():
    mine = Tuning(64, 2**10)
    assert Blockwise(tuning=mine).on("cuda") == Blockwise(tuning=mine)
    assert Blockwise(block_q=7).on("rocm") == Blockwise(block_q=7, tuning=GPU)
    assert Blockwise().on("other").tuning == CPU


def test_tiles_without_loops_are_cut_over_devices_and_move_nothing():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "model"))
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(rng.standard_normal((2, 48, 4, 8)), jnp.float32) for _ in "qkvd"]

    def passes(q, k, v, d_out):
        def attention(*a):
            return attend(Call(*a, mask=Causal()), Blockwise(16, 16, tuning=GPU)).out

        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(d_out)

    program = jax.jit(passes).lower(*(jax.device_put(a, place) for a in arrays)).compile()
    text = program.as_text()
    moves = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "while(")
    assert not [word for word in moves if word in text]
    found = program(*(jax.device_put(a, place) for a in arrays))
    for own, one in zip(found, jax.jit(passes)(*arrays)):
        np.testing.assert_allclose(own, one, atol=1e-5)
