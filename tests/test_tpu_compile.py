"""Ahead-of-time compilation for TPUs that are not there: lowering, VMEM limits, no temporary of T x S."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mha_jax import (
    Call,
    Causal,
    ChunkedCausal,
    Dense,
    Dilated,
    Dropout,
    MultiHeadAttention,
    PrefixLM,
    Rotary,
    SameSegment,
    Tokens,
    Window,
    attend,
    biases,
    explain,
)
from mha_jax.attention.call import Output
from mha_jax.attention.check import check
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.pallas_tpu.sizes import SIZES
from mha_jax.layer.vectors import normalized

pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
from tests.test_pallas_tpu_biases import EveryOperation
from tests.topologies import TOPOLOGIES, VERSION, compiled, largest_array


def shape_of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


WORDS = shape_of(2, dtype=jnp.uint32)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is compiled for one kind of chip: both passes of the kernel."""

    kind: str
    size: int  # H
    lengths: tuple[int, int]
    value_size: int = 0  # H if 0
    heads: tuple[int, int] = (2, 2)
    batch: int = 1
    dtype: Any = jnp.bfloat16
    options: Callable = lambda: {}
    arrays: dict = dataclasses.field(default_factory=dict)

    def compile(self):
        (t, s), (n, kv), b = self.lengths, self.heads, self.batch
        v = self.value_size or self.size
        sizes = {"q": (b, t, n, self.size), "k": (b, s, kv, self.size), "v": (b, s, kv, v)}
        qkv = {name: shape_of(*size, dtype=self.dtype) for name, size in sizes.items()}
        backend = PallasTPU(SIZES[self.kind])

        def both_passes(qkv, d_out, arrays):
            call = check(Call(**qkv, **self.options(**arrays)))
            state = backend.forward(call)
            return state, backend.cotangent(call, state, Output(d_out, jnp.ones_like(state.l)))

        d_out = shape_of(b, t, n, v, dtype=self.dtype)
        return compiled(self.kind, both_passes, qkv, d_out, self.arrays)


SHORT = Tokens(512, segment=np.arange(512)[None] // 99, pos=np.arange(512)[None] % 99)


def causal():
    return {"mask": Causal()}


def window():
    return {"mask": Window(1023, 0)}


def dropped(key):
    return {"mask": Causal(), "dropout": Dropout(key, 0.1)}


def packed(ids):
    tokens = Tokens(ids.shape[1], segment=ids)
    return {"q_tokens": tokens, "k_tokens": tokens, "mask": SameSegment() & Causal()}


def packed_causal():
    return {"q_tokens": SHORT, "k_tokens": SHORT, "mask": Causal()}


def packed_by_tiles():
    tokens = Tokens(2048, segment=np.arange(2048, dtype=np.int32)[None] // 512)
    return {"q_tokens": tokens, "k_tokens": tokens, "mask": SameSegment()}


def sloped_by_data(slopes):
    return {**packed_causal(), "bias": biases.Alibi(slopes)}


def ruled_by_data(weights, scale):
    few = Tokens(128, segment=np.arange(128)[None] // 99, pos=np.arange(128)[None] % 99)
    return {**dict.fromkeys(("q_tokens", "k_tokens"), few), "bias": EveryOperation(weights, scale)}


def placed_and_dropped(key):
    tokens = Tokens(512, index=np.arange(512, dtype=np.int32)[None])
    return {"q_tokens": tokens, "k_tokens": tokens, "dropout": Dropout(key, 0.1)}


def chunked():
    return {"mask": ChunkedCausal(1000) & ~Dilated(3)}


def prefix(lengths):
    return {"mask": PrefixLM(lengths)}


KEY = {"key": WORDS}
SQUARE = (4096, 4096)
# Every chip with every head size and every length, each feature on old chips and new ones.
GRID = {
    "v4-chunked": Compiled("v4", 64, (2048, 2048), options=chunked),
    "v4-32": Compiled("v4", 32, (2048, 2048), 16, (4, 1), options=dropped, arrays=KEY),
    "v4-narrow": Compiled("v4", 32, (16384, 16384), 16, (1, 1), options=causal),
    "v4-64": Compiled("v4", 64, (4095, 4095), 0, (4, 1), options=window),
    "v4-128": Compiled(
        "v4",
        128,
        SQUARE,
        batch=2,
        options=packed,
        arrays={"ids": shape_of(2, 4096, dtype=jnp.int32)},
    ),
    "v4-ruled": Compiled(
        *("v4", 128, (512, 512)),
        options=sloped_by_data,
        arrays={"slopes": shape_of(2, dtype=jnp.float32)},
    ),
    "v4-256": Compiled("v4", 256, SQUARE, options=causal),
    "v4-float32": Compiled("v4", 128, (2048, 2048), 64, dtype=jnp.float32, options=causal),
    "v5e-32": Compiled("v5e", 32, (100, 129), 48),
    "v5e-64": Compiled("v5e", 64, (32768, 32768), heads=(1, 1), options=causal),
    "v5e-128": Compiled("v5e", 128, (1, 4096), 64, (8, 2)),
    "v5e-256": Compiled("v5e", 256, SQUARE, 128, options=causal),
    # Facts that no mask reads, or none of the tiles that are visited.
    "v5e-packed": Compiled("v5e", 128, (512, 512), options=packed_causal),
    "v5e-by-tiles": Compiled("v5e", 128, (2048, 2048), options=packed_by_tiles),
    "v5e-placed": Compiled("v5e", 128, (512, 512), options=placed_and_dropped, arrays=KEY),
    "v5e-ruled": Compiled(
        *("v5e", 128, (128, 128)),
        options=ruled_by_data,
        arrays={"weights": shape_of(9, dtype=jnp.float32), "scale": shape_of(2, dtype=jnp.float32)},
    ),
    "v5p-32": Compiled("v5p", 32, (129, 4095), options=lambda: {"logit_cap": 30.0}),
    "v5p-64": Compiled("v5p", 64, (1, 1)),
    "v5p-128": Compiled("v5p", 128, (32768, 32768), heads=(1, 1), options=window),
    "v5p-256": Compiled("v5p", 256, SQUARE, options=causal),
    "v6e-32": Compiled(
        "v6e", 32, (2048, 2048), options=packed, arrays={"ids": shape_of(1, 2048, dtype=jnp.int32)}
    ),
    "v6e-prefix": Compiled(
        *("v6e", 64, (2048, 2048)),
        batch=2,
        options=prefix,
        arrays={"lengths": shape_of(2, dtype=jnp.int32)},
    ),
    "v6e-64": Compiled("v6e", 64, SQUARE, 32, (4, 1), options=dropped, arrays=KEY),
    "v6e-128": Compiled("v6e", 128, (4095, 4095), options=window),
    "v6e-256": Compiled("v6e", 256, SQUARE, options=causal),
    "tpu7x-32": Compiled("tpu7x", 32, (4095, 100), heads=(4, 2), options=causal),
    "tpu7x-64": Compiled("tpu7x", 64, (32768, 32768), heads=(1, 1), options=causal),
    "tpu7x-128": Compiled("tpu7x", 128, SQUARE, options=dropped, arrays=KEY),
    "tpu7x-256": Compiled("tpu7x", 256, (2048, 2048)),
}


@pytest.mark.parametrize("name", GRID)
def test_both_passes_compile_and_keep_nothing_of_t_x_s(name):
    case = GRID[name]
    if case.kind == "tpu7x" and VERSION < (0, 0, 30):
        pytest.skip("this libtpu does not know the chip: pip install -U libtpu")
    t, s = case.lengths
    padded_operand = -(-max(t, s) // 512) * 512 * case.heads[0] * case.size
    program = case.compile()
    assert largest_array(program) < max(t * s, padded_operand + 1)
    if name in ("v5e-64", "v5p-128"):  # the longest; a row of 64 takes the lanes of one of 128
        used = program.memory_analysis().temp_size_in_bytes
        assert used < 10 * t * case.heads[0] * case.size * 2


LONG, ROW = 32768, np.arange(32768, dtype=np.int32)[None]
PACKED = Tokens(LONG, segment=ROW // 4099, pos=ROW % 4099)


def turned(w, q, k):
    return Call(Rotary()(q, ROW), Rotary()(k, ROW), k, mask=Causal())


def ruled(w, q, k):
    q, k = (normalized("rms", w["norm"], x) for x in (q, k))
    bias = biases.Alibi.of_heads(8) + biases.Buckets(w["table"])
    return Call(q, k, k, mask=Window(1023, 0), bias=bias, logit_cap=30.0)


def ruled_and_packed(w, q, k):
    bias = biases.Alibi(w["sinks"])
    return Call(q, k, k, PACKED, PACKED, Causal() & SameSegment(), bias)


def packed_and_dropped(w, q, k):
    options = {"mask": Causal(), "dropout": Dropout(w["key"], 0.1), "sinks": w["sinks"]}
    return Call(q, k, k, q_tokens=PACKED, k_tokens=PACKED, **options)


@pytest.mark.parametrize("features", [turned, ruled, ruled_and_packed, packed_and_dropped])
def test_a_step_with_features_needs_less_than_ten_times_the_queries(features):
    if VERSION < (0, 0, 30):
        pytest.skip("this libtpu keeps 11.5 times with rotary positions: pip install -U libtpu")
    x, wide = shape_of(1, LONG, 8, 128), functools.partial(shape_of, dtype=jnp.float32)
    numbers = {"sinks": wide(8), "norm": wide(128), "table": wide(32, 8)}

    def loss(numbers, q, k, v, key):
        call = features({**numbers, "key": key}, q, k)
        out = attend(dataclasses.replace(call, v=v)).out
        return (out.astype(jnp.float32) ** 2).sum()

    program = compiled("v6e", jax.grad(loss, (0, 1, 2, 3)), numbers, x, x, x, WORDS)
    used = program.memory_analysis().temp_size_in_bytes
    assert used < 10 * LONG * 8 * 128 * 2


@pytest.mark.parametrize(("kind", "heads"), [("v4", 1), ("v6e", 2)])
def test_dense_masks_are_streamed(kind, heads):
    length = 2048
    arrays = {"seen": shape_of(1, heads, length, length, dtype=jnp.bool_)}
    case = Compiled(
        kind, 128, (length, length), options=lambda seen: {"mask": Dense(seen)}, arrays=arrays
    )
    program = case.compile()
    # XLA hands booleans to kernels as bytes: a copy of the mask itself, and nothing else of its size.
    assert largest_array(program) == heads * length * length
    used = program.memory_analysis().temp_size_in_bytes
    assert used < heads * length * length + 2**23


def test_a_dense_bias_is_streamed():
    length = 1024
    arrays = {"bias": shape_of(1, 2, length, length, dtype=jnp.float32)}
    case = Compiled("v4", 128, (length, length), options=lambda bias: {"bias": bias}, arrays=arrays)
    assert largest_array(case.compile()) == 2 * length * length


def test_lengths_that_fit_need_no_padding():
    x = shape_of(1, 4096, 1, 128)

    def forward(q, k, v):
        return PallasTPU(SIZES["v5e"]).forward(check(Call(q, k, v))).out

    # Statistics of 4096 rows are there; one padded copy of q would be 2**20 bytes.
    assert compiled("v5e", forward, x, x, x).memory_analysis().temp_size_in_bytes < 2**17


# ---- as users meet it ------------------------------------------------------------------------------


def test_explain_knows_tpus_that_are_not_there():
    x = shape_of(1, 4096, 1, 128)
    assert next(iter(explain(Call(x, x, x), platform="tpu").items())) == ("pallas_tpu", "can run")
    says = explain(Call(x, x, x), platform="cpu")["pallas_tpu"]
    assert says == "it needs a TPU; this program is for cpu"


def test_attend_takes_the_kernel_when_it_is_lowered_for_a_tpu():
    x = shape_of(1, 129, 1, 64)
    program = compiled("v6e", lambda q, k, v: attend(Call(q, k, v, mask=Causal())), x, x, x)
    assert "attention_forward" in program.as_text()


def test_a_program_exported_here_carries_the_kernel():
    x = shape_of(1, 129, 1, 64)
    function = jax.jit(lambda q, k, v: attend(Call(q, k, v)).out)
    exported = export.export(function, platforms=["tpu"])(x, x, x)
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize("training", [False, True])
def test_the_layer_takes_the_kernel_when_it_is_lowered_for_a_tpu(training):
    layer = MultiHeadAttention(num_heads=4, key_dim=64, dropout=0.1, dtype=jnp.bfloat16)
    x = shape_of(2, 512, 256)
    variables = jax.eval_shape(
        lambda: layer.init(jax.random.key(0), jnp.ones(x.shape), jnp.ones(x.shape))
    )

    def loss(variables, x, real, words):
        out = layer.apply(
            variables,
            x,
            x,
            query_mask=real,
            value_mask=real,
            use_causal_mask=True,
            training=training,
            rngs={"dropout": jax.random.wrap_key_data(words)},
        )
        return jnp.sum(out.astype(jnp.float32))

    step = jax.grad(loss) if training else loss
    text = compiled("v5e", step, variables, x, shape_of(2, 512, dtype=jnp.bool_), WORDS).as_text()
    assert "attention_forward" in text
    assert ("attention_backward" in text) == training


def test_the_grid_covers_every_chip():
    assert {case.kind for case in GRID.values()} == set(TOPOLOGIES) == set(SIZES)
