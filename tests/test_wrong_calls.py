"""Every public name called wrongly, argument by argument: it works, or it raises one of our errors.

The calls are built from the signatures: each argument of a right call is replaced by what it cannot mean. A
name or an argument that is added is here by itself, and one without a right call is told.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax.backends.blockwise import Blockwise
from mha_jax.backends.cudnn import CuDNN
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.interop import flax as from_flax
from mha_jax.interop import torch as from_torch
from mha_jax.layer import constraints, initializers, regularizers
from mha_jax.models import bert, transformer
from tests.drawn import draw, draw_variables

B, T, S, N, H, D = 1, 2, 3, 2, 4, 5
Q, K, X, Y = draw(0, B, T, N, H), draw(1, B, S, N, H), draw(2, B, T, D), draw(3, B, S, D)
LAYER = mj.MultiHeadAttention(num_heads=N, key_dim=H)
VARIABLES = draw_variables(LAYER, X, Y)
PARAMS = VARIABLES["params"]
KEY = jax.random.key(0)


class Thing:
    """What nothing here takes."""


WRONG: dict[str, Any] = {
    "none": None,
    "text": "text",
    "true": True,
    "zero": 0,
    "negative": -7,
    "huge": 10**30,
    "fraction": 2.5,
    "nan": float("nan"),
    "list": [1, "a", None],
    "dict": {"a": 1},
    "thing": Thing(),
    "class": Thing,
    "function": lambda *a, **k: None,
    "floats": np.ones((7, 1, 3), np.float32),
    "ints": np.arange(3),
    "bools": np.ones((1, 5), bool),
    "complex": np.ones(2, np.complex64),
    "words": np.array(["a", "b"]),
    "objects": np.array([None, Thing()], object),
    "half": jnp.ones((1, 2, 2, 4), jnp.bfloat16),
    "masked floats": np.ma.masked_array(K, K > 0),
    "masked bools": np.ma.masked_array(np.ones((B, S), bool)),
    "of another byte order": np.asarray(K).astype(np.asarray(K).dtype.newbyteorder()),
    "long doubles": np.ones((B, S, D), np.longdouble),
    "float8": jnp.ones((B, S, D), jnp.float8_e4m3fn),
    "int4": jnp.ones((B, S), jnp.int4),
    "ragged": [[1, 2], [3]],
    "key": KEY,
}


OWN = ("on_projection", "activity_regularizer")


class Door(NamedTuple):
    """A public name, a right call of it, and what is done with its result."""

    function: Callable[..., Any]
    right: dict[str, Any]
    use: Callable[[Any], Any] = lambda result: result
    called: Callable[..., Any] | None = (
        None  # what is called, where `function` only has the signature
    )


def dot(**options):
    return mj.dot_product_attention(Q, K, K, **options)


def masked(mask):
    tokens = {"query_tokens": mj.Tokens(T), "key_tokens": mj.Tokens(S)}
    return dot(mask=mask & mj.Causal(), **tokens)


def placed(tokens):
    """Use tokens in everything that reads them."""
    mask = mj.Causal() & mj.ValidQueries()
    out = dot(mask=mask, query_tokens=tokens)
    if tokens.segment is not None:
        ids = mj.Tokens(S, segment=np.zeros((1, S), np.int32))
        dot(mask=mj.SameSegment(), query_tokens=tokens, key_tokens=ids)
    return out


def biased(bias):
    return dot(bias=bias)


def made(layer):
    """Initialize a layer and call it, in shapes only."""

    def run(key, x):
        variables = layer.init({"params": key, "dropout": key}, x, x)
        options = {"mutable": True, "rngs": {"dropout": key}}
        return layer.apply(variables, x, x, **options)

    jax.eval_shape(run, KEY, X)
    return layer.empty_cache(1, 2)


def drawn(initializer):
    layer = mj.MultiHeadAttention(num_heads=N, key_dim=H, kernel_initializer=initializer)
    return jax.eval_shape(layer.init, KEY, X, X)


def turned(scaling):
    return mj.Rotary(scaling=scaling)(Q, np.arange(T))


def blockwise(**options):
    """Make the backend as where no annotation is checked."""
    backend = Blockwise()
    for name, value in options.items():
        object.__setattr__(backend, name, value)
    backend.__post_init__()
    return backend


CALL = mj.Call(Q, K, K)
ARRAYS = {"query": Q, "key": K, "value": K}
CACHE = mj.Cache.empty(batch=B, capacity=4, num_kv_heads=N, key_dim=H)
LAYERS = mj.Cache.empty(batch=B, capacity=4, num_kv_heads=N, key_dim=H, layers=2)
TABLE = np.ones((8, N), np.float32)
SCORES = np.full((N, T, S), 1 / S, np.float32)
SIZES = {"num_heads": N, "key_dim": H}
ON_NNX = mj.nnx.MultiHeadAttention(**SIZES, in_features=D, rngs=nnx.Rngs(0))


DOORS = {
    # Functions.
    "dot_product_attention": Door(mj.dot_product_attention, ARRAYS),
    "dot_product_attention with a cache": Door(
        mj.dot_product_attention, {**ARRAYS, "query": K, "cache": CACHE}
    ),
    "remat_policy": Door(mj.remat_policy, {}),
    "attend": Door(mj.attend, {"call": CALL}),
    "attention_scores": Door(mj.attention_scores, {"call": CALL}),
    "explain": Door(mj.explain, {"call": CALL}),
    "scores_entropy": Door(mj.scores_entropy, {"call": CALL}),
    "scores_max": Door(mj.scores_max, {"call": CALL}),
    "scores_mean": Door(mj.scores_mean, {"call": CALL}),
    "scores_top_k": Door(mj.scores_top_k, {"call": CALL, "k": 2}),
    # What a call is made of.
    "Call": Door(mj.Call, {"q": Q, "k": K, "v": K}, mj.attend),
    "Tokens": Door(mj.Tokens, {"length": T}, placed),
    "Tokens.packed": Door(mj.Tokens.packed, {"ids": np.zeros((1, T), np.int32)}, placed),
    "Dropout": Door(mj.Dropout, {"key": KEY, "rate": 0.5}, lambda dropout: dot(dropout=dropout)),
    "Window": Door(mj.Window, {"left": 1, "right": 1}, masked),
    "ChunkedCausal": Door(mj.ChunkedCausal, {"size": 2}, masked),
    "Dilated": Door(mj.Dilated, {"step": 2}, masked),
    "PrefixLM": Door(mj.PrefixLM, {"lengths": 2}, masked),
    "Dense": Door(mj.Dense, {"array": np.ones((T, S), bool)}, masked),
    "Mask.matrix": Door(mj.Causal().matrix, {"q": mj.Tokens(2), "k": mj.Tokens(3)}),
    "Mask.__and__": Door(mj.Causal().__and__, {"other": mj.Full()}, masked),
    "Mask.__or__": Door(mj.Causal().__or__, {"other": mj.Full()}, masked),
    # Biases.
    "Alibi": Door(mj.biases.Alibi, {"slopes": np.ones(N, np.float32)}, biased),
    "Alibi.of_heads": Door(mj.biases.Alibi.of_heads, {"heads": N}, biased),
    "Buckets": Door(mj.biases.Buckets, {"table": TABLE}, biased),
    "Relative": Door(mj.biases.Relative, {"table": TABLE[:5]}, biased),
    "Array": Door(mj.biases.Array, {"array": np.ones((T, S), np.float32)}, biased),
    "Sum": Door(
        mj.biases.Sum, dict.fromkeys("ab", mj.biases.Alibi(np.ones(N, np.float32))), biased
    ),
    # The cache.
    "Cache.empty": Door(
        mj.Cache.empty, {"batch": 1, "capacity": 2, "num_kv_heads": 1, "key_dim": 3}
    ),
    "Cache.of_layer": Door(LAYERS.of_layer, {"layer": 1}),
    "Cache.append": Door(CACHE.append, {"keys": K, "values": K}),
    "Cache.truncated": Door(CACHE.truncated, {"count": 1}),
    "Cache.reorder": Door(CACHE.reorder, {"rows": np.array([0])}),
    "Cache.next_positions": Door(CACHE.next_positions, {"length": 2}),
    # Rotary positions.
    "Rotary": Door(mj.Rotary, {}, lambda rotary: rotary(Q, np.arange(T))),
    "Rotary.__call__": Door(mj.Rotary().__call__, {"x": Q, "positions": np.arange(T)}),
    "Rotary.size": Door(mj.Rotary().size, {"head_size": 4}),
    "Rotary.frequencies": Door(mj.Rotary().frequencies, {"head_size": 4}),
    "Rotary.from_config": Door(mj.Rotary.from_config, {"config": {}}),
    "Rotary.to_config": Door(mj.Rotary().to_config, {}),
    "Linear": Door(mj.rotary.Linear, {"factor": 2.0}, turned),
    "NTK": Door(mj.rotary.NTK, {"factor": 2.0}, turned),
    "Llama3": Door(mj.rotary.Llama3, {"factor": 2.0}, turned),
    "YaRN": Door(mj.rotary.YaRN, {"factor": 2.0, "original_length": 8}, turned),
    # The layer.
    "MultiHeadAttention": Door(mj.MultiHeadAttention, SIZES, made),
    "MultiHeadAttention.__call__": Door(
        LAYER.__call__, {"query": X, "value": Y}, called=functools.partial(LAYER.apply, VARIABLES)
    ),
    "MultiHeadAttention.empty_cache": Door(LAYER.empty_cache, {"batch": 1, "capacity": 2}),
    "MultiHeadAttention.constrain": Door(LAYER.constrain, {"params": PARAMS}),
    "MultiHeadAttention.from_config": Door(LAYER.from_config, {"values": LAYER.get_config()}),
    "init_params": Door(mj.init_params, {"rng": KEY, "query": X, "value": X, **SIZES}),
    "multi_head_attention": Door(
        mj.multi_head_attention, {"params": PARAMS, "query": X, "value": Y}
    ),
    "nnx": Door(mj.nnx.MultiHeadAttention, {**SIZES, "in_features": D, "rngs": nnx.Rngs(0)}),
    "nnx.__call__": Door(ON_NNX.__call__, {"query": X, "value": Y}),
    "nnx.from_linen": Door(
        mj.nnx.MultiHeadAttention.from_linen,
        {"module": LAYER, "variables": VARIABLES, "rngs": nnx.Rngs(0)},
    ),
    # Keras's objects.
    **{
        f"initializers.{name}": Door(getattr(initializers, name), right, drawn)
        for name, right in {
            "Constant": {"value": 1.0},
            "Identity": {},
            "Orthogonal": {},
            "RandomNormal": {},
            "RandomUniform": {},
            "TruncatedNormal": {},
            "VarianceScaling": {},
            "get": {"spec": "zeros"},
        }.items()
    },
    **{
        f"regularizers.{name}": Door(
            getattr(regularizers, name), right, lambda f: f and f(jnp.ones((3, 2)))
        )
        for name, right in {
            "L1": {},
            "L2": {},
            "L1L2": {},
            "OrthogonalRegularizer": {},
            "get": {"spec": "l2"},
        }.items()
    },
    **{
        f"constraints.{name}": Door(
            getattr(constraints, name), right, lambda f: f and f(jnp.ones((3, 2)))
        )
        for name, right in {
            "MaxNorm": {},
            "MinMaxNorm": {},
            "NonNeg": {},
            "UnitNorm": {},
            "get": {"spec": "unit_norm"},
        }.items()
    },
    "constraints.constrain": Door(constraints.constrain, {"params": PARAMS}),
    "constraints.as_optax": Door(constraints.as_optax, {}),
    # Meshes.
    "Sharded": Door(mj.sharding.Sharded, {}, lambda backend: dot(backend=backend)),
    "Ring": Door(mj.sharding.Ring, {"axis": "x"}),
    "Gather": Door(mj.sharding.Gather, {"axis": "x"}),
    "Heads": Door(mj.sharding.Heads, {"axis": "x"}),
    "logical_axes": Door(mj.sharding.logical_axes, {"params": PARAMS}),
    "partition_specs": Door(mj.sharding.partition_specs, {"params": PARAMS, "rules": {}}),
    "with_logical_names": Door(mj.sharding.with_logical_names, {"params": PARAMS}),
    "balanced": Door(mj.sharding.balanced, {"x": X, "axis": 1, "parts": 1}),
    "restored": Door(mj.sharding.restored, {"x": X, "axis": 1, "parts": 1}),
    # Backends.
    "Blockwise": Door(Blockwise, {}, lambda backend: dot(backend=backend), called=blockwise),
    "PallasTPU": Door(PallasTPU, {}, lambda backend: dot(backend=backend)),
    "CuDNN": Door(CuDNN, {}, lambda backend: dot(backend=backend)),
    # Other libraries.
    "import_linen": Door(from_flax.import_linen, {"linen_module": LAYER, "variables": VARIABLES}),
    "export_linen": Door(from_flax.export_linen, {"module": LAYER, "variables": VARIABLES}),
    "import_nnx": Door(from_flax.import_nnx, {"nnx_layer": None}),
    "export_nnx": Door(
        from_flax.export_nnx, {"module": LAYER, "variables": VARIABLES, "rngs": nnx.Rngs(0)}
    ),
    "torch.import_layer": Door(from_torch.import_layer, {"torch_layer": None}),
    "torch.import_state": Door(from_torch.import_state, {"state": {}, "num_heads": 2}),
    "torch.export_state": Door(from_torch.export_state, {"module": LAYER, "variables": VARIABLES}),
    "torch.import_masks": Door(
        from_torch.import_masks, {"attn_mask": np.zeros((T, S), bool), "num_heads": N}
    ),
    # Models.
    "transformer.Config": Door(transformer.Config, {"width": 8, "num_heads": 2}),
    "transformer.sinusoids": Door(transformer.sinusoids, {"positions": np.arange(3), "width": 4}),
    "bert.Config": Door(bert.Config, {}),
    # Pictures.
    "visualize.html": Door(mj.visualize.html, {"scores": SCORES}),
    "visualize.heads": Door(mj.visualize.heads, {"scores": SCORES}),
    "visualize.layers": Door(mj.visualize.layers, {"scores": [SCORES]}),
    "visualize.masks": Door(
        mj.visualize.masks, {"rules": {"causal": mj.Causal()}, "queries": mj.Tokens(3)}
    ),
    "visualize.entropy": Door(mj.visualize.entropy, {"layers": [SCORES]}),
    "visualize.curves": Door(mj.visualize.curves, {"series": {"loss": ([0, 1], [1.0, 2.0])}}),
}


def wrong_calls(name: str) -> Iterator[tuple[str, str]]:
    """Yield the parameters of a door and the names of what they are given."""
    for parameter in inspect.signature(DOORS[name].function).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            for what in WRONG:
                # A file is written wherever it is said; a module's name and parent are Flax's to check.
                # What a function of the caller's own does is its own.
                own = what in ("function", "class") and parameter.name.startswith(OWN)
                if parameter.name not in ("path", "parent", "name") and not own:
                    yield parameter.name, what


def attempt(name: str, parameter: str, what: str) -> str | None:
    """Make one wrong call; say what fell, in a line that can be found again."""
    door = DOORS[name]
    try:
        door.use((door.called or door.function)(**door.right | {parameter: WRONG[what]}))
    except mj.MhaError as error:
        text = str(error)
        assert len(text) > 20, text
    except Exception as error:
        line = (str(error).splitlines() or [""])[0][:100]
        return f"{name}({parameter}={what}): {type(error).__name__}: {line}"
    return None


@pytest.mark.parametrize("name", DOORS)
def test_a_wrong_call_works_or_raises_one_of_our_errors(name):
    fell = [found for one in wrong_calls(name) if (found := attempt(name, *one))]
    assert not fell, "\n".join(fell)


def test_there_is_a_right_call_for_every_public_name():
    known = {name.partition(".")[0] for name in DOORS}
    plain = {
        "Causal",
        "Full",
        "Mask",
        "Output",
        "SameSegment",
        "ValidKeys",
        "ValidQueries",
        "Cache",
    }
    errors = {name for name in mj.__all__ if name.endswith("Error")}
    assert set(mj.__all__) - known - plain - errors == set()
    for room in (mj.biases, mj.rotary):
        assert set(room.__all__) - known <= {"Bias", "OfDistance", "Scaling", "pytree", "static"}
    assert sum(1 for name in DOORS for _ in wrong_calls(name)) >= 300
