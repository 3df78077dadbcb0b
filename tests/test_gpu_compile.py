"""Ahead-of-time compilation for GPUs that are not there: who runs what, and nothing of T x S."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_cards
from mha_jax import Cache, Call, Causal, Full, MultiHeadAttention, Rotary, attend
from mha_jax.attention.biases import Alibi, Buckets

if (why := gpu_cards.missing()) is not None:
    pytest.skip(why, allow_module_level=True)

LENGTH, WIDTH, HEADS = 3072, 64, 4
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
# The logits of the smallest and of the largest tile, and what the operations of a looped one launch at most.
SMALLEST, LARGEST, LAUNCHES = HEADS * 2**20, 2**24, 16


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer, and how it is called."""

    card: str
    training: bool = False
    dtype: Any = jnp.bfloat16
    causal: bool = True
    padded: bool = False
    tiles: bool = False  # whether tiles are there
    fused: bool = True  # whether cuDNN is called
    options: dict = dataclasses.field(default_factory=dict)

    def compile(self):
        options = {"num_heads": HEADS, "key_dim": 64, "dtype": self.dtype} | self.options
        layer = MultiHeadAttention(**options)
        x = jax.ShapeDtypeStruct((1, LENGTH, WIDTH), self.dtype)
        small = jnp.zeros((1, 3, WIDTH), self.dtype)
        variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), small, small))

        def loss(variables, x, real, words):
            masks = {"query_mask": real, "value_mask": real} if self.padded else {}
            out = layer.apply(
                *(variables, x, x),
                use_causal_mask=self.causal,
                training=self.training,
                rngs={"dropout": jax.random.wrap_key_data(words)},
                **masks,
            )
            return jnp.sum(out.astype(jnp.float32))

        real = jax.ShapeDtypeStruct((1, LENGTH), jnp.bool_)
        words = jax.ShapeDtypeStruct((2,), jnp.uint32)
        step = jax.grad(loss) if self.training else loss
        return gpu_cards.counts(gpu_cards.compiled(self.card, step, variables, x, real, words))


GRID = {
    "causal": Layer("A100", training=True),
    "full": Layer("H100", causal=False, dtype=jnp.float16),
    "window_of_the_past": Layer("B200", training=True, options={"sliding_window": 512}),
    "few_kv_heads": Layer("H100", options={"num_kv_heads": 2, "value_dim": 40}),
    "padding": Layer("H100", training=True, padded=True, tiles=True),
    "float32": Layer("A100", training=True, dtype=jnp.float32, tiles=True, fused=False),
    "dropout": Layer("B200", training=True, tiles=True, fused=False, options={"dropout": 0.1}),
    "window": Layer("A100", causal=False, tiles=True, fused=False, options={"sliding_window": 512}),
    "modern": Layer(
        "H100", training=True, options={"num_kv_heads": 2, "rotary": Rotary(), "qk_norm": "rms"}
    ),
    # Their gradient is that of lse, which the tiles pull back.
    "sinks": Layer("A100", training=True, tiles=True, options={"use_sinks": True}),
    "soft_cap": Layer("B200", training=True, tiles=True, fused=False, options={"logit_cap": 30.0}),
    "wide_heads": Layer("A100", tiles=True, fused=False, options={"key_dim": 136}),
}


@pytest.mark.parametrize("name", GRID)
def test_the_layer_compiles_takes_the_right_backend_and_keeps_nothing_of_t_x_s(name):
    case = GRID[name]
    found = case.compile()
    wanted = {FORWARD, BACKWARD} if case.training else {FORWARD}
    assert wanted.intersection(found.calls) == (wanted if case.fused else set())
    assert (found.largest >= SMALLEST) == case.tiles
    assert max(found.loops, default=0) <= LAUNCHES
    assert found.largest <= LARGEST < HEADS * LENGTH * LENGTH
    assert found.temporaries < 4 * HEADS * LENGTH * LENGTH


@pytest.mark.parametrize("card", ["A100", "B200"])
def test_biases_by_rule_compile_with_their_gradients(card):
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((32, HEADS), jnp.float32)

    def gradients(q, k, v, table, d_out):
        def attention(q, k, v, table):
            bias = Alibi.of_heads(HEADS) + Buckets(table)
            return attend(Call(q, k, v, mask=Causal(), bias=bias)).out

        return jax.vjp(attention, q, k, v, table)[1](d_out)

    found = gpu_cards.counts(gpu_cards.compiled(card, gradients, x, x, x, table, x))
    assert found.largest <= LARGEST < HEADS * LENGTH * LENGTH
    assert found.temporaries < 4 * HEADS * LENGTH * LENGTH


@pytest.mark.parametrize("length", [1, 512])
def test_a_cache_is_read_without_all_pairs(length):
    layer = MultiHeadAttention(HEADS, 64, num_kv_heads=2, rotary=Rotary(), dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, length, WIDTH), jnp.bfloat16)
    variables = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, x), x)
    cache = jax.eval_shape(lambda: Cache.empty(2, 4 * LENGTH, 2, 64, dtype=jnp.bfloat16))

    def step(variables, x, cache):
        return layer.apply(variables, x, x, use_causal_mask=True, cache=cache)

    found = gpu_cards.counts(gpu_cards.compiled("H100", step, variables, x, cache))
    assert found.largest <= LARGEST


# Launches of a tile, those before and after all of them among these: 10 tiles, 16 tiles, 4 groups of 10.
# Where nothing is masked, that weights taken again are at most 1 costs two launches backward.
@pytest.mark.parametrize(
    ("card", "shape", "mask", "forward", "both"),
    [
        ("A100", (1, 4096, 4, 64), Causal(), 5.2, 13.5),
        ("A100", (1, 4096, 4, 64), Full(), 5.0, 13.2),
        ("H100", (4, 4096, 16, 64), Causal(), 4.8, 12.5),
    ],
)
def test_a_tile_in_float32_is_four_launches_and_eleven_with_its_gradients(
    card, shape, mask, forward, both
):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def attention(q, k, v):
        return attend(Call(q, k, v, mask=mask), "blockwise").out

    def gradients(q, k, v, d_out):
        return jax.vjp(attention, q, k, v)[1](d_out)

    # Two products forward, and five backward.
    assert 2 * gpu_cards.counts(gpu_cards.compiled(card, attention, x, x, x)).a_product <= forward
    assert 7 * gpu_cards.counts(gpu_cards.compiled(card, gradients, x, x, x, x)).a_product <= both


def test_the_branch_beside_cudnn_is_there_only_where_the_cotangent_of_lse_is():
    x = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)

    def gradients(both):
        def function(q, k, v):
            out, pull = jax.vjp(lambda *a: attend(Call(*a, mask=Causal())), q, k, v)
            zeros = jnp.zeros_like(out.lse)
            return pull(out if both else out._replace(lse=zeros))

        return gpu_cards.counts(gpu_cards.compiled("H100", function, x, x, x))

    found = gradients(both=True)
    assert found.a_product and BACKWARD in found.calls
    assert not gradients(both=False).a_product


def test_the_measure_sees_loops_and_large_arrays():
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    looped = gpu_cards.counts(
        gpu_cards.compiled("H100", lambda x: jax.lax.fori_loop(0, 7, lambda i, y: y @ x, x), x)
    )
    assert len(looped.loops) == 1 and 1 <= looped.loops[0] <= 4
    assert looped.largest == 1024 * 1024
