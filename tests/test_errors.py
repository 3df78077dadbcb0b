"""A table of wrong calls: each a clear error of ours that names the values and says how to fix it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Call, MhaError, ShapeError, UnsupportedError, WeightsError
from mha_jax.attention.masks import Reach
from mha_jax.backends.blockwise import Blockwise
from mha_jax.backends.cudnn import CuDNN
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.reference import Reference
from mha_jax.errors import ArgumentError
from tests.drawn import draw_variables

B, T, S, N, K, H, V, D = 2, 5, 7, 6, 3, 4, 2, 8


def ones(*shape, dtype=np.float32):
    return jnp.ones(shape, dtype)


Q, KEYS, VALUES = ones(B, T, N, H), ones(B, S, K, H), ones(B, S, K, V)
X, Y = ones(B, T, D), ones(B, S, D)
RNG = jax.random.key(0)
PARAMS = mj.init_params(RNG, X, Y, num_heads=2, key_dim=4)


def dot(q=Q, k=KEYS, v=VALUES, **options):
    return mj.dot_product_attention(q, k, v, **options)


def make(**options):
    return mj.MultiHeadAttention(**({"num_heads": 2, "key_dim": 4} | options))


def apply(*inputs, layer=None, **options):
    layer = layer or make()
    return layer.apply(draw_variables(layer, X, Y), *(inputs or (X, Y)), **options)


def functional(*inputs, **options):
    params = mj.init_params(RNG, X, Y, num_heads=2, key_dim=4)
    return mj.multi_head_attention(params, *(inputs or (X, Y)), **options)


@dataclasses.dataclass(frozen=True)
class OnlyTpu(Reference):
    """A backend that cannot run here."""

    def why_not(self, call, platform):
        return None if platform == "tpu" else "it needs a TPU"


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A call, and what its error must say: what happened, and how to fix it."""

    name: str
    run: Callable[[], Any]
    says: tuple[str, ...]
    kind: type[MhaError] = ShapeError


def wrong(name, run, *says, kind=ShapeError):
    return Wrong(name, run, says, kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Says(mj.Mask):
    """A rule of a user's that says what it is told to."""

    what: str = dataclasses.field(metadata={"static": True})

    def visible(self, q, k):
        return {
            "distance": lambda: q.positions - k.positions,
            "floats": lambda: (q.positions >= k.positions).astype(np.float32),
            "flat": lambda: q.positions[0, 0] >= k.positions[0, 0],
            "nothing": lambda: None,
        }[self.what]()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reaches(mj.Mask):
    """A causal rule of a user's that is as certain of tiles as it is told to be."""

    what: str = dataclasses.field(metadata={"static": True})

    def visible(self, q, k):
        return q.positions >= k.positions

    def reach(self, q, k):
        some, every = q.positions[1] >= k.positions[0], q.positions[0] >= k.positions[1]
        return {
            "pair": lambda: (some, every),
            "nothing": lambda: None,
            "numbers": lambda: Reach(some.astype(int), every),
            "flat": lambda: Reach(some[0, 0, 0], every),
            "truths": lambda: Reach(True, False),
        }[self.what]()


class Unregistered(mj.Mask):
    """A rule of a user's that JAX does not know."""

    def visible(self, q, k):
        return q.positions >= k.positions


def blockwise(**options):
    """Make a backend as where no annotation is checked."""
    backend = Blockwise()
    for name, value in options.items():
        object.__setattr__(backend, name, value)
    backend.__post_init__()


FILLED = mj.Cache.empty(2, 5, num_kv_heads=1, key_dim=2)
BOOL_TS = np.ones((T, S), bool)
INT_TS = np.where(np.tri(T, S, dtype=bool), 0, -10000)
CORE = [
    wrong("q_rank", lambda: dot(Q[0, 0]), "same rank, at least 3", "(6, 4)", "axis of their own"),
    wrong("ranks_differ", lambda: dot(Q[0]), "same rank", "query.shape=(5, 6, 4)"),
    wrong("batch", lambda: dot(Q[:1]), "same batch axes", "(1, 5, 6, 4)", "broadcast_to"),
    wrong("batch_of_v", lambda: dot(v=VALUES[:1]), "same batch axes", "value.shape=(1, 7, 3, 2)"),
    wrong("key_and_value_length", lambda: dot(v=VALUES[:, 1:]), "same length and heads"),
    wrong("key_and_value_heads", lambda: dot(v=VALUES[:, :, 1:]), "same length and heads"),
    wrong("head_size", lambda: dot(Q[..., 1:]), "same head size", "only value may differ"),
    wrong("heads_do_not_divide", lambda: dot(Q[:, :, 1:]), "must divide", "5 query heads"),
    wrong(
        "heads_first",
        lambda: dot(Q.swapaxes(1, 2), KEYS.swapaxes(1, 2), VALUES.swapaxes(1, 2)),
        "must divide the query heads",
        "transpose arrays that have heads first",
    ),
    wrong(
        "prefix_lengths",
        lambda: dot(mask=mj.PrefixLM(jnp.ones(3, jnp.int32))),
        "lengths of PrefixLM must be",
        "batch axes (2,)",
        "got int32[3]",
    ),
    wrong(
        "precision_text",
        lambda: dot(precision="hihg"),
        "precision must be what",
        "'hihg'",
        "'high'",
    ),
    wrong(
        "no_array_bias", lambda: dot(bias={"a": 1}), "bias must be an array", "dict", "np.asarray"
    ),
    wrong(
        "words_as_queries", lambda: dot(np.array(["a"])), "query must hold floating-point", "<U1"
    ),
    wrong("flax_switch", lambda: dot(is_causal="no"), "is_causal must be True or False", "'no'"),
    wrong(
        "flax_rate",
        lambda: dot(dropout_rate=ones(2)),
        "dropout_rate must be a number",
        "float32[2]",
    ),
    wrong("flax_module", lambda: dot(module=3), "module must be a Flax module", "got 3"),
    wrong("no_tokens", lambda: mj.Causal().matrix(5, 7), "q must be of class Tokens", "int"),
    wrong("alibi_heads", lambda: mj.biases.Alibi.of_heads(0), "heads of Alibi.of_heads", "got 0"),
    wrong(
        "top_k_of_none", lambda: mj.scores_top_k(None, 3), "call must be of class Call", "NoneType"
    ),
    wrong(
        "shared_start_wide",
        lambda: dot(dropout=mj.Dropout(RNG, 0.1, batch_start=2**31)),
        "one integer of 32 bits",
        "2147483648",
    ),
    wrong(
        "rng_number",
        lambda: mj.init_params(7, X, X, num_heads=2, key_dim=4),
        "rng must be one JAX key",
    ),
    wrong(
        "not_a_tree",
        lambda: mj.multi_head_attention({"query": 3}, X, X),
        "parameters must be",
        "dict",
        kind=WeightsError,
    ),
    wrong(
        "no_rules",
        lambda: mj.sharding.partition_specs({}, 3),
        "rules must be of class Mapping",
        "int",
    ),
    wrong(
        "rule_number",
        lambda: mj.sharding.partition_specs({}, {"heads": ("model", 3)}),
        "rules cut 'heads' along ('model', 3)",
        "name of a mesh axis",
    ),
    wrong(
        "rules_twice",
        lambda: mj.sharding.partition_specs(PARAMS, {"heads": "model", "kv": ("data", "model")}),
        "twice along 'model'",
    ),
    wrong(
        "layer_without_kernels",
        lambda: mj.sharding.logical_axes({"block": PARAMS | {"key": {"bias": ones(4)}}}),
        "whose key has no kernel",
    ),
    wrong(
        "layer_of_matrices",
        lambda: mj.sharding.logical_axes(PARAMS | {"query": {"kernel": ones(16, 32)}}),
        "whose query has no kernel",
    ),
    wrong("no_arrays", lambda: mj.sharding.logical_axes({"a": 3}), "params must hold arrays", "3"),
    wrong(
        "truncate",
        lambda: mj.rotary.YaRN(2.0, 8, truncate="no"),
        "truncate of YaRN must be True or False",
    ),
    wrong(
        "relative_axes",
        lambda: dot(bias=mj.biases.Relative(ones(5, N), (0, "a"))),
        "axes of Relative",
        "'a'",
    ),
    wrong(
        "tpu_sizes",
        lambda: PallasTPU(sizes="v5e"),
        "sizes of PallasTPU must be of class Sizes",
        "str",
    ),
    wrong("tpu_interpret", lambda: PallasTPU(interpret="yes"), "interpret of PallasTPU", "str"),
    wrong("cudnn_version", lambda: CuDNN(cuda=12), "CuDNN(cuda=12)", "two integers"),
    wrong(
        "tuning",
        lambda: blockwise(tuning="gpu"),
        "tuning of Blockwise must be of class Tuning",
        "str",
    ),
    wrong(
        "reorder",
        lambda: FILLED.reorder(np.array([2])),
        "rows must be integers from 0 to 1",
        "from 2 to 2",
    ),
    wrong("kept", lambda: FILLED.truncated(-1), "count must be integers from 0", "from -1 to -1"),
    wrong("chunk", lambda: FILLED.next_positions(2.5), "length must be an integer from 0", "2.5"),
    wrong("prefix_floats", lambda: dot(mask=mj.PrefixLM(0.5)), "got float32[]"),
    wrong("sinks_of_kv_heads", lambda: dot(sinks=ones(K)), "[N] = [6]", "got float32[3]"),
    wrong("one_sink", lambda: dot(sinks=0.5), "logit for every query head", "jnp.full(6, logit)"),
    wrong("no_kv_heads", lambda: dot(k=KEYS[:, :, :0], v=VALUES[:, :, :0]), "must divide", "0 key"),
    wrong("dtypes_differ", lambda: dot(Q.astype("bfloat16")), "one dtype", "bfloat16", "Cast them"),
    wrong("integer_q", lambda: dot(Q.astype(int)), "floating-point", "int32", "Embed or cast"),
    wrong("boolean_v", lambda: dot(v=VALUES > 0), "value must hold floating-point", "bool"),
    wrong("complex_k", lambda: dot(k=KEYS.astype("complex64")), "key must hold floating-point"),
    wrong("list_q", lambda: dot([[[1.0]]]), "must be a NumPy or JAX array", "list", "jnp.asarray"),
    wrong("none_k", lambda: dot(k=None), "key must be a NumPy or JAX array", "NoneType"),
    wrong("float_mask", lambda: dot(mask=ones(T, S)), "True or False", "float32", "`bias`"),
    wrong(
        "additive_mask",
        lambda: dot(mask=np.where(BOOL_TS, 0.0, -1e9)),
        "True or False",
        "pass it as `bias`",
    ),
    wrong("integer_mask", lambda: dot(mask=INT_TS), "True or False", "-10000", "a bias", "lengths"),
    wrong("mask_255", lambda: dot(mask=np.uint8(255) * BOOL_TS), "value 255", "pass mask != 0"),
    wrong("mask_and_none", lambda: mj.Causal() & None, "must be a Mask", "NoneType", "Dense"),
    wrong("mask_or_class", lambda: mj.Causal() | mj.Window, "must be a Mask", "Window"),
    wrong("true_and_mask", lambda: np.True_ & mj.Causal(), "must be a Mask", "bool"),
    wrong("and_of_masks", lambda: mj.Causal() and mj.ValidKeys(), "neither true nor", "`&`"),
    wrong("not_a_mask", lambda: not mj.Window(1, 1), "Window is a rule", "`~`"),
    wrong(
        "integer_mask_in_a_rule",
        lambda: dot(mask=mj.Causal() & INT_TS),
        "True or False",
        "value -10000",
    ),
    *(
        wrong(
            f"rule_says_{what}",
            lambda what=what: dot(mask=~(mj.Causal() | Says(what))),
            "Says.visible must return booleans",
            "(2, 6, 5, 7)",
            got,
            "combine comparisons",
        )
        for what, got in (
            ("distance", "int32[1, 1, 5, 7]"),
            ("floats", "float32[1, 1, 5, 7]"),
            ("flat", "bool[5, 7]"),
            ("nothing", "NoneType"),
        )
    ),
    *(
        wrong(
            f"reach_is_{what}",
            lambda what=what: dot(mask=~(mj.Window(3, 0) | Reaches(what))),
            "Reaches.reach must return Reach(some, every)",
            got,
            "Compare the ends",
        )
        for what, got in (
            ("pair", "tuple"),
            ("nothing", "NoneType"),
            ("numbers", "'int64[1, 1, 1, 1]'"),
            ("flat", "'bool[1]'"),
        )
    ),
    wrong(
        "rule_is_no_pytree", lambda: dot(mask=Unregistered()), "Unregistered", "register_dataclass"
    ),
    wrong("mask_shape", lambda: dot(mask=BOOL_TS.T), "does not fit", "(7, 5)", "[*B, N, T, S]"),
    wrong(
        "mask_heads", lambda: dot(mask=np.ones((B, 5, T, S), bool)), "mask of shape (2, 5, 5, 7)"
    ),
    wrong("mask_of_keys", lambda: dot(mask=np.ones((B, S), bool)), "ValidKeys()", "key_mask"),
    wrong("mask_rank", lambda: dot(mask=np.ones(S, bool)), "mask of shape (7,)", "does not fit"),
    wrong("mask_too_many_axes", lambda: dot(mask=np.ones((1, 1, 1, T, S), bool)), "does not fit"),
    wrong("bias_is_a_class", lambda: dot(bias=mj.biases.Alibi), "class Alibi", "write Alibi(...)"),
    wrong("bias_is_a_mask", lambda: dot(bias=mj.Causal()), "bias must be", "mask=", "not Causal"),
    wrong(
        "bias_of_heads", lambda: dot(bias=ones(N)), "(6,)", "bias[:, None, None]", "Alibi(slopes)"
    ),
    wrong("bias_of_all", lambda: dot(bias=ones(N, T, S)), "(6, 5, 7)", "[N, T, S], is bias[None]"),
    wrong(
        "tokens_of_ids",
        lambda: dot(key_tokens=mj.Tokens(np.zeros((B, S), int))),
        "key_tokens begin with their number: got Tokens(int64[2, 7])",
        "Tokens(7, segment=ids)",
        "Tokens.packed(ids)",
    ),
    wrong("rate_before_key", lambda: mj.Dropout(0.1, RNG), "Dropout(key, rate) in this order"),
    wrong("boolean_bias", lambda: dot(bias=BOOL_TS), "floating point", "bool", "as `mask`"),
    wrong("bias_shape", lambda: dot(bias=ones(S, T)), "bias of shape (7, 5)", "does not fit"),
    wrong("bias_without_heads", lambda: dot(bias=ones(B, T, S)), "bias of shape (2, 5, 7)"),
    wrong("rate_of_one", lambda: mj.Dropout(RNG, 1.0), "[0, 1)", "1.0", "dropout=None"),
    wrong("rate_negative", lambda: mj.Dropout(RNG, -0.1), "[0, 1)", "-0.1"),
    wrong("rate_in_percent", lambda: mj.Dropout(RNG, 10), "[0, 1)", "got 10"),
    wrong("rate_nan", lambda: mj.Dropout(RNG, float("nan")), "[0, 1)", "nan"),
    wrong("rate_flag", lambda: mj.Dropout(RNG, False), "[0, 1)", "False"),
    wrong(
        "batch_start_float",
        lambda: dot(dropout=mj.Dropout(RNG, 0.1, batch_start=1.0)),
        "batch_start of a Dropout must be one integer",
        "1.0",
    ),
    wrong(
        "head_start_array",
        lambda: dot(dropout=mj.Dropout(RNG, 0.1, 0, np.arange(2))),
        "head_start of a Dropout must be one integer",
        "[0, 1]",
    ),
    wrong("rate_traced", lambda: jax.jit(lambda r: mj.Dropout(RNG, r))(0.5), "[0, 1)"),
    wrong("dropout_is_a_rate", lambda: dot(dropout=0.1), "must be a Dropout or None", "0.1"),
    wrong("scale_nan", lambda: dot(scale=float("nan")), "scale must be a finite", "nan"),
    wrong("scale_array", lambda: dot(scale=ones(1)), "scale must be a finite number"),
    wrong(
        "cap_traced",
        lambda: jax.jit(lambda cap: dot(logit_cap=cap))(3.0),
        "logit_cap must be known while tracing",
        "static_argnames='logit_cap'",
    ),
    wrong("cap_zero", lambda: dot(logit_cap=0.0), "logit_cap must be positive", "None for no cap"),
    wrong("cap_huge", lambda: dot(logit_cap=1e38), "at most 1e+30", "None for no cap"),
    wrong("cap_negative", lambda: dot(logit_cap=-3), "logit_cap must be positive", "-3"),
    wrong(
        "tokens_length",
        lambda: dot(key_tokens=mj.Tokens(T)),
        "key_tokens must describe every token",
        "length=5",
        "7 tokens",
    ),
    wrong("tokens_array", lambda: dot(query_tokens=np.arange(T)), "query_tokens must be Tokens"),
    wrong(
        "start_beyond_32_bits",
        lambda: dot(query_tokens=mj.Tokens(T, start=2**31 - 2)),
        "query_tokens.start",
        "fit 32 bits",
        "2147483646",
    ),
    wrong(
        "start_float", lambda: dot(key_tokens=mj.Tokens(S, start=1.0)), "key_tokens.start", "1.0"
    ),
    wrong(
        "list_of_positions",
        lambda: dot(key_tokens=mj.Tokens(S, pos=[list(range(S))])),
        "key_tokens.pos must be an array",
        "list",
    ),
    wrong(
        "float_positions",
        lambda: dot(query_tokens=mj.Tokens(T, pos=np.ones((1, T)))),
        "query_tokens.pos must hold integers",
        "float64",
    ),
    wrong(
        "integer_validity",
        lambda: dot(key_tokens=mj.Tokens(S, valid=np.ones((1, S), int))),
        "key_tokens.valid must hold booleans",
        "int64",
    ),
    wrong(
        "segment_shape",
        lambda: dot(key_tokens=mj.Tokens(S, segment=np.ones((3, S), int))),
        "key_tokens.segment must have shape (2, 7)",
        "(3, 7)",
    ),
    wrong("no_segments", lambda: dot(mask=mj.SameSegment()), "no segments", "segment=ids"),
    wrong("no_segments_deep", lambda: dot(mask=~(mj.Causal() | mj.SameSegment())), "no segments"),
    wrong(
        "unknown_backend",
        lambda: dot(backend="cudnn9"),
        "no backend named 'cudnn9'",
        "'blockwise'",
        kind=UnsupportedError,
    ),
    wrong(
        "backend_that_cannot",
        lambda: dot(backend=OnlyTpu()),
        "OnlyTpu cannot run this call: it needs a TPU",
        "backend=None",
        "blockwise",
        kind=UnsupportedError,
    ),
    wrong("backend_is_no_backend", lambda: dot(backend=3), "backend", "3", kind=MhaError),
    wrong("backend_class", lambda: dot(backend=Reference), "backend", "Reference", kind=MhaError),
    wrong("platform", lambda: mj.explain(Call(Q, KEYS, VALUES), "gpu"), "unknown platform 'gpu'"),
    wrong(
        "heads_first_text",
        lambda: mj.attend(Call(Q, KEYS, VALUES, heads_first="no")),
        "heads_first must be True or False",
        "'no'",
    ),
    *(
        wrong(f"{name}_{size}", lambda o={name: size}: blockwise(**o), name, repr(size))
        for name, size in (
            ("block_q", 0),
            ("block_k", -16),
            ("block_q", 2.5),
            ("pairs", True),
            ("exhaustive", "no"),
            ("apart", 1),
        )
    ),
    wrong("call_is_an_array", lambda: mj.attend(Q), "Call", kind=MhaError),
    wrong("mask_is_a_name", lambda: dot(mask="causal"), "mask", "Causal()", kind=MhaError),
    wrong("mask_is_a_class", lambda: dot(mask=mj.Causal), "mask", "Causal()", kind=MhaError),
    wrong(
        "window_without_size", lambda: dot(mask=mj.Window(None, 0)), "left", "None", kind=MhaError
    ),
    wrong("window_fraction", lambda: dot(mask=mj.Window(1.5, 0)), "left", "1.5", kind=MhaError),
    wrong(
        "score_rows_out_of_range",
        lambda: mj.attention_scores(Call(Q, KEYS, VALUES), rows=np.array([5])),
        "rows",
        "5",
        kind=MhaError,
    ),
    wrong(
        "score_heads_out_of_range",
        lambda: mj.attention_scores(Call(Q, KEYS, VALUES), heads=np.array([6])),
        "heads",
        "6",
        kind=MhaError,
    ),
    wrong(
        "lse_of_another_call",
        lambda: mj.attention_scores(Call(Q, KEYS, VALUES), lse=ones(B, T, N)),
        "lse",
        "(2, 6, 5)",
        kind=MhaError,
    ),
    wrong(
        "lse_of_text", lambda: mj.attention_scores(Call(Q, KEYS, VALUES), lse="x"), "lse of shape"
    ),
    *(
        wrong(
            f"score_{name}_{which}",
            lambda o={name: which}: mj.attention_scores(Call(Q, KEYS, VALUES), **o),
            f"{name}=",
            "do not exist",
        )
        for name, which in (("heads", 1), ("rows", 0.5), ("rows", slice(0.5)), ("heads", "0"))
    ),
    wrong(
        "score_rows_traced_floats",
        lambda: jax.jit(lambda r: mj.attention_scores(Call(Q, KEYS, VALUES), rows=r))(np.ones(2)),
        "rows='float32[2]'",
        "do not exist",
    ),
    *(
        wrong(
            f"top_{k}", lambda k=k: mj.scores_top_k(Call(Q, KEYS, VALUES), k), f"k={k!r}", "1 to S"
        )
        for k in (0, S + 1, 2.0, "3")
    ),
]
MAKING = [
    wrong("num_heads_zero", lambda: make(num_heads=0), "num_heads must be a positive", "0"),
    wrong("num_heads_float", lambda: make(num_heads=8.0), "num_heads must be a positive", "8.0"),
    wrong("num_heads_flag", lambda: make(num_heads=True), "num_heads must be a positive", "True"),
    wrong("key_dim_negative", lambda: make(key_dim=-4), "key_dim must be a positive", "embed_dim"),
    wrong("value_dim_zero", lambda: make(value_dim=0), "value_dim must be a positive", "or None"),
    wrong("kv_heads", lambda: make(num_heads=6, num_kv_heads=4), "must divide num_heads", "4"),
    wrong("kv_heads_zero", lambda: make(num_kv_heads=0), "num_kv_heads must be a positive"),
    wrong("window_zero", lambda: make(sliding_window=0), "sliding_window must be a positive"),
    wrong("window_pair", lambda: make(sliding_window=(1, 1)), "sliding_window", "(1, 1)"),
    wrong("dropout_one", lambda: make(dropout=1.0), "dropout must be a number in [0, 1)", "1.0"),
    wrong("dropout_negative", lambda: make(dropout=-0.5), "[0, 1)", "-0.5"),
    wrong("dropout_text", lambda: make(dropout="0.1"), "[0, 1)", "'0.1'"),
    wrong("dropout_flag", lambda: make(dropout=True), "[0, 1)", "True"),
    wrong("use_bias_text", lambda: make(use_bias="no"), "use_bias must be True or False", "'no'"),
    wrong("use_gate_number", lambda: make(use_gate=1), "use_gate must be True or False", "1"),
    wrong("training_text", lambda: make(training="yes"), "training must be True, False or None"),
    wrong("seed_key", lambda: make(seed=RNG), "seed must be an integer or None", "rngs="),
    wrong("output_shape_zero", lambda: make(output_shape=0), "output_shape must be", "got 0"),
    wrong("output_shape_empty", lambda: make(output_shape=()), "output_shape must be", "()"),
    wrong("output_shape_float", lambda: make(output_shape=(2, 3.0)), "output_shape must be"),
    wrong("axes_text", lambda: make(attention_axes="1"), "attention_axes must be", "'1'"),
    wrong("axes_empty", lambda: make(attention_axes=()), "attention_axes must be"),
    wrong("axes_float", lambda: make(attention_axes=(1.0,)), "attention_axes must be", "1.0"),
    wrong("initializer", lambda: make(kernel_initializer="glorot"), "glorot", "glorot_uniform"),
    wrong("bias_initializer", lambda: make(bias_initializer=0.0), "is not an initializer"),
    wrong("regularizer", lambda: make(kernel_regularizer="l3"), "unknown regularizer 'l3'"),
    wrong("activity", lambda: make(activity_regularizer=0.1), "is not a regularizer"),
    wrong("constraint", lambda: make(bias_constraint="maxnorm2"), "maxnorm2"),
    wrong(
        "initializer_config",
        lambda: make(kernel_initializer={"name": "zeros"}),
        "is not the config of an initializer",
        kind=WeightsError,
    ),
    *(
        wrong(
            f"call_argument_{name}",
            lambda name=name: make(**{name: True}),
            name,
            "is an argument of the call, not of the constructor",
            "layer.apply",
            kind=ArgumentError,
        )
        for name in (
            "query_mask",
            "value_mask",
            "key_mask",
            "attention_mask",
            "mask",
            "use_causal_mask",
            "return_attention_scores",
            "key",
        )
    ),
    wrong(
        "unknown_key_in_a_config",
        lambda: mj.MultiHeadAttention.from_config({"num_heads": 2, "key_dims": 4}),
        "unknown key 'key_dims'",
        "Did you mean 'key_dim'?",
        kind=WeightsError,
    ),
    wrong(
        "a_function_in_a_config",
        lambda: make(kernel_initializer=jax.nn.initializers.zeros).get_config(),
        "plain function",
        kind=WeightsError,
    ),
    wrong(
        "a_backend_object_in_a_config",
        lambda: make(backend=Reference()).get_config(),
        "by name",
        kind=WeightsError,
    ),
]
CALLING = [
    wrong("list_input", lambda: apply([[1.0]], Y), "query must be an array", "list"),
    wrong("vector_input", lambda: apply(ones(D), ones(D)), "query must be an array", "(8,)"),
    wrong(
        "token_ids", lambda: apply(X.astype(int), Y), "floating-point", "int32", "embed token ids"
    ),
    wrong(
        "another_library's_array",
        lambda: apply(X, keras.Input((S, 7))),
        "value must be an array of floating-point numbers: got keras.",
        "convert anything else",
    ),
    wrong("ranks", lambda: apply(X[0], Y), "same rank", "(5, 8)", "(2, 7, 8)"),
    wrong("batches", lambda: apply(X[:1], Y), "not attended", "(1, 5, 8)"),
    wrong("key_and_value", lambda: apply(X, Y, Y[:, 1:]), "value and key must agree", "(2, 6, 8)"),
    wrong(
        "torch_order",
        lambda: apply(X, Y, X),
        "value and key must agree",
        "in this order",
    ),
    wrong(
        "torch_order_by_width",
        lambda: functional(X, ones(B, S, 3), Y),
        "value kernel",
        "query, value, key, in this order",
        kind=WeightsError,
    ),
    wrong("width_changed", lambda: functional(X[..., 1:], Y), "query kernel", kind=WeightsError),
    wrong("axis_out_of_range", lambda: functional(attention_axes=(3,)), "attention_axes=(3,)"),
    wrong("axis_of_features", lambda: functional(attention_axes=(2,)), "holds the features"),
    wrong("axis_repeated", lambda: functional(attention_axes=(1, -2)), "each axis once", "(1, 1)"),
    wrong(
        "float_attention_mask",
        lambda: functional(attention_mask=ones(T, S)),
        "attention_mask holds",
        "`bias`",
    ),
    wrong(
        "attention_mask_of_keys",
        lambda: functional(attention_mask=np.ones((B, S), bool)),
        "value_mask",
    ),
    wrong(
        "attention_mask_heads",
        lambda: functional(attention_mask=np.ones((B, 3, T, S), bool)),
        "(2, 3, 5, 7)",
    ),
    wrong(
        "query_mask_shape",
        lambda: functional(query_mask=np.ones((B, S), bool)),
        "query_mask of shape (2, 7)",
    ),
    wrong(
        "value_mask_shape",
        lambda: functional(value_mask=np.ones((B, T), bool)),
        "value_mask of shape (2, 5)",
    ),
    wrong(
        "key_mask_rank",
        lambda: functional(key_mask=np.ones((B, S, 1, 1), bool)),
        "key_mask of shape",
    ),
    wrong(
        "float_key_mask",
        lambda: functional(key_mask=ones(B, S)),
        "key_mask holds True or False",
        "float32",
    ),
    wrong(
        "rule_as_query_mask",
        lambda: apply(X, Y, Y, mj.Causal()),
        "query_mask must be an array of booleans",
        "goes into mask=",
    ),
    wrong(
        "pictures_of_a_result",
        lambda: mj.visualize.html(apply(X, X, return_attention_scores=True)),
        "got tuple",
        "y, scores = layer.apply(...)",
    ),
    wrong(
        "mask_as_array", lambda: functional(mask=BOOL_TS), "mask", "attention_mask", kind=MhaError
    ),
    wrong(
        "tokens_of_the_layer", lambda: functional(key_tokens=mj.Tokens(T)), "describe every token"
    ),
    wrong("training_twice", lambda: apply(layer=make(training=True), training=True), "one of them"),
    wrong(
        "training_traced",
        lambda: jax.jit(lambda t: apply(training=t))(True),
        "training must be True or False while tracing",
        "static_argnames",
    ),
    wrong(
        "no_dropout_key",
        lambda: apply(layer=make(dropout=0.1), training=True),
        '"dropout" stream',
        'rngs={"dropout"',
    ),
    wrong(
        "seed_without_counter",
        lambda: apply(layer=make(dropout=0.1, seed=3), training=True),
        "seed=3",
        'mutable=["dropout_state"]',
    ),
    wrong(
        "layer_backend",
        lambda: make(backend="flash").init(RNG, X, Y),
        "no backend named 'flash'",
        kind=UnsupportedError,
    ),
    wrong(
        "orthogonal_regularizer_of_a_kernel",
        lambda: apply(
            layer=make(kernel_regularizer={"class_name": "OrthogonalRegularizer", "config": {}}),
            mutable=["losses"],
        ),
        "rank 2",
    ),
    wrong(
        "params_without_a_kernel", lambda: mj.multi_head_attention({}, X, Y), "query", kind=MhaError
    ),
]


def cached(*inputs, cache=None, layer=None, **options):
    layer = layer or make()
    cache = layer.empty_cache(B, S) if cache is None else cache
    return layer.apply(draw_variables(layer, X, Y), *(inputs or (X, X)), cache=cache, **options)


def one_cache(batch=B, heads=2, key_dim=4, value_dim=4, **options):
    return mj.Cache.empty(batch, S, heads, key_dim, value_dim, **options)


CACHING = [
    wrong("cache_size", lambda: make().empty_cache(B, 0), "capacity", "positive integer", "got 0"),
    wrong("cache_size_float", lambda: one_cache(batch=2.0), "batch of a cache", "got 2.0"),
    wrong(
        "cache_batch",
        lambda: cached(cache=one_cache(batch=3)),
        "(2, 2, 4, 4), the cache (3, 2, 4, 4)",
        "empty_cache",
    ),
    wrong("cache_heads", lambda: cached(cache=one_cache(heads=1)), "the cache (2, 1, 4, 4)"),
    wrong("cache_key_dim", lambda: cached(cache=one_cache(key_dim=3)), "the cache (2, 2, 3, 4)"),
    wrong(
        "cache_value_dim", lambda: cached(cache=one_cache(value_dim=5)), "the cache (2, 2, 4, 5)"
    ),
    wrong(
        "cache_read_with_other_heads",
        lambda: cached(X, None, cache=one_cache(heads=1)),
        "the cache (2, 1, 4, 4)",
    ),
    wrong(
        "cache_dtype",
        lambda: cached(cache=make().empty_cache(B, S, dtype="bfloat16")),
        "holds bfloat16, keys and values are float32",
        "dtype='float32'",
        "nothing is cast",
    ),
    wrong(
        "cache_overflow",
        lambda: cached(ones(B, S + 1, D), ones(B, S + 1, D)),
        "row 0 was given 8 tokens and holds at most 7",
        "Make it larger",
    ),
    wrong(
        "cache_of_several_axes",
        lambda: functional(*(ones(B, 3, T, D),) * 2, attention_axes=(1, 2), cache=one_cache()),
        "grows along one axis",
        "(1, 2)",
    ),
    wrong("cache_key_alone", lambda: cached(X, None, Y), "value and key must agree", "(2, 0, 8)"),
    wrong(
        "cache_chunk_rank",
        lambda: one_cache().append(ones(B, T, 8), ones(B, T, 8)),
        "keys [B, L, K, H]",
        "(2, 5, 8)",
    ),
    wrong(
        "cache_chunk_lengths",
        lambda: one_cache().append(ones(B, T, 2, 4), ones(B, 1, 2, 4)),
        "(2, 5, 2, 4) and (2, 1, 2, 4)",
    ),
    wrong(
        "cache_chunk_list", lambda: one_cache().append([1.0], [1.0]), "keys [B, L, K, H]", "(1,)"
    ),
    *(
        wrong(
            f"cache_valid_{valid.dtype}{valid.shape}",
            lambda valid=valid: one_cache().append(ones(B, T, 2, 4), ones(B, T, 2, 4), valid),
            "valid must hold a boolean for every token",
            "[2, 5] or [1, 5]",
            f"{valid.dtype}{list(valid.shape)}",
        )
        for valid in (
            np.ones((B, 1), bool),
            np.ones(T, bool),
            np.ones((3, T), bool),
            np.ones((B, T), np.int32),
            np.ones((B, T), np.float32),
        )
    ),
    wrong(
        "cache_valid_list",
        lambda: one_cache().next_positions(T, [[True] * T]),
        "valid must hold a boolean for every token",
        "got list",
    ),
    wrong(
        "cache_count_negative",
        lambda: dataclasses.replace(one_cache(), count=jnp.array([0, -2])).append(
            ones(B, T, 2, 4), ones(B, T, 2, 4)
        ),
        "0 or more",
        "[0, -2]",
    ),
    wrong(
        "cache_values_of_another_dtype",
        lambda: one_cache().append(ones(B, T, 2, 4), ones(B, T, 2, 4, dtype="bfloat16")),
        "holds float32, keys and values are bfloat16",
    ),
    wrong(
        "cache_at_initialisation",
        lambda: make().init(RNG, X, None, cache=one_cache()),
        "while initialising",
        "layer.init(rng, query, value)",
    ),
    wrong("no_value_without_a_cache", lambda: apply(X, None), "value must be an array", "NoneType"),
    wrong(
        "a_cache_to_the_constructor",
        lambda: make(cache=one_cache()),
        "is an argument of the call",
        kind=ArgumentError,
    ),
    wrong(
        "cache_key_tokens_of_the_chunk",
        lambda: cached(key_tokens=mj.Tokens(T)),
        "describe every token",
        "for 7 tokens",
    ),
]
TABLE = CORE + MAKING + CALLING + CACHING


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_a_wrong_call_is_explained(case):
    with pytest.raises(MhaError) as caught:
        case.run()
    assert isinstance(caught.value, case.kind)
    message = str(caught.value)
    for text in case.says:
        assert text in message, f"{text!r} is not in: {message}"
    assert len(message) > 35, message


def test_the_table_is_long_and_its_names_differ():
    names = [case.name for case in TABLE]
    assert len(names) == len(set(names)) >= 40


def test_a_rule_may_be_certain_of_all_tiles_alike():
    want = dot(mask=~(mj.Window(3, 0) | mj.Causal()))
    np.testing.assert_array_equal(dot(mask=~(mj.Window(3, 0) | Reaches("truths"))), want)


def test_a_wrong_call_is_explained_while_tracing():
    with pytest.raises(ShapeError, match="same head size"):
        jax.jit(dot)(Q[..., 1:])
    with pytest.raises(ShapeError, match="same head size"):
        jax.grad(lambda q: dot(q).sum())(Q[..., 1:])
    with pytest.raises(ShapeError, match="same head size"):
        jax.eval_shape(dot, Q[..., 1:])


def test_the_classes_are_also_those_of_python():
    assert issubclass(ShapeError, ValueError)
    assert issubclass(UnsupportedError, NotImplementedError)
    assert issubclass(WeightsError, ValueError)
    assert issubclass(ArgumentError, TypeError)
