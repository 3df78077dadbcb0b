"""The layer's arguments are declared once: at every door the same names, defaults, checks and words."""

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax.errors import ArgumentError, MhaError, WeightsError
from mha_jax.layer.arguments import FIELDS, OF_CALL, Arguments

B, T, S, D = 2, 5, 7, 11
X, Y = jnp.ones((B, T, D)), jnp.ones((B, S, D))
LEAST = {"num_heads": 4, "key_dim": 3}
LINEN = mj.MultiHeadAttention(**LEAST)
VARIABLES = LINEN.init(jax.random.key(0), X, Y)
NNX = mj.nnx.MultiHeadAttention(**LEAST, in_features=D, rngs=nnx.Rngs(0))


def more(values):
    return LEAST | values


def made_of_a_config(values):
    return mj.nnx.MultiHeadAttention.from_config(more(values), in_features=D, rngs=nnx.Rngs(0))


DOORS = {
    "linen": lambda values: mj.MultiHeadAttention(**more(values)),
    "nnx": lambda values: mj.nnx.MultiHeadAttention(
        **more(values), in_features=D, rngs=nnx.Rngs(0)
    ),
    "init_params": lambda values: mj.init_params(jax.random.key(0), X, Y, **more(values)),
    "clone": lambda values: LINEN.clone(**values),
    "config": lambda values: mj.MultiHeadAttention.from_config(more(values)),
    "nnx config": made_of_a_config,
}
CALL_DOORS = {"call": lambda values: mj.multi_head_attention(VARIABLES["params"], X, Y, **values)}
NO_OBJECT = "not-one-of-keras"
WRONG = {
    "num_heads": (0, -1, True, 2.0, "2", None),
    "key_dim": (0, False, np.float32(3), (3,)),
    "value_dim": (0, -5, True, 5.0),
    "dropout": (1.0, -0.1, float("nan"), "0.1", True, None, 1j),
    "use_bias": ("no", 1, None, np.ones(3), ("query", "nothing")),
    "output_shape": (0, (), (2, 0), (2.0,), "3", True),
    "attention_axes": ((), "1", 1.0, True, (True,), {1}),
    "sliding_window": (0, -3, True, 2.5, (1, 1)),
    "kernel_initializer": (NO_OBJECT, 3, None),
    "bias_initializer": (NO_OBJECT, 0.0),
    "kernel_regularizer": (NO_OBJECT, 0.1),
    "bias_regularizer": (NO_OBJECT, 0.1),
    "activity_regularizer": (NO_OBJECT, True),
    "kernel_constraint": (NO_OBJECT, 2),
    "bias_constraint": (NO_OBJECT, 2),
    "use_gate": ("yes", 0, None),
    "seed": (0.5, True, "7", 2**64, -(2**63) - 1),
    "num_kv_heads": (0, 3, True, 2.0),
    "training": ("no", 1, np.ones(3)),
    "dtype": (int, "float33", "int8"),
    "param_dtype": (None, bool, "float33"),
    "precision": ("hi", 3, ["high"]),
    "rotary": (3, True, "rope", {"rope_theta": 1e4}),
    "qk_norm": ("l3", True, 1),
    "use_sinks": ("yes", 1, None),
    "scale": ("1", True, float("inf"), 1j),
    "logit_cap": (0, -1.0, "30", float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_door_refuses_the_same_values_in_the_same_words(name):
    doors = DOORS | (CALL_DOORS if name in OF_CALL else {})
    for value in WRONG[name]:
        said = {}
        for door, enter in doors.items():
            if door.endswith("config") and name == "dtype":
                continue  # Keras's policy: both dtypes
            with pytest.raises(MhaError) as caught:
                enter({name: value})
            said[door] = str(caught.value)
        assert len(set(said.values())) == 1, said
        assert name in said["linen"] or "is not a" in said["linen"] or NO_OBJECT in said["linen"]


def test_the_table_of_wrong_values_is_whole():
    assert set(FIELDS) - set(WRONG) == {"backend"}, (
        "which the engine checks, when it is asked to run"
    )


def test_a_backend_is_refused_in_the_same_words():
    said = set()
    for run in (
        lambda: mj.MultiHeadAttention(**LEAST, backend="flash").apply(VARIABLES, X, Y),
        lambda: made_of_a_config({"backend": "flash"})(X, Y),
        lambda: mj.multi_head_attention(VARIABLES["params"], X, Y, backend="flash"),
    ):
        with pytest.raises(MhaError, match="no backend named 'flash'") as caught:
            run()
        said.add(str(caught.value))
    assert len(said) == 1


def test_every_call_refuses_the_same_switches():
    calls = (
        lambda **o: LINEN.apply(VARIABLES, X, Y, **o),
        lambda **o: NNX(X, Y, **o),
        lambda **o: mj.multi_head_attention(VARIABLES["params"], X, Y, **o),
    )
    for name in ("use_causal_mask", "return_attention_scores", "training"):
        for value in ("false", 1, np.ones((T, S), bool)):
            said = set()
            for call in calls[: 2 if name == "training" else 3]:
                with pytest.raises(mj.ShapeError, match=name) as caught:
                    call(**{name: value})
                said.add(str(caught.value))
            assert len(said) == 1


UNKNOWN = [
    ("linen", {"dropout_rate": 0.1}, "'dropout_rate'. Did you mean 'dropout'? It takes num_heads"),
    ("linen", {"is_causal": True}, "'use_causal_mask'? That one is an argument of the call"),
    ("linen", {"kv_heads": 3}, "Did you mean 'num_kv_heads'?"),
    ("nnx", {"rope": True}, "Did you mean 'rotary', mj.Rotary()?"),
    ("nnx", {"qkv_features": 12}, "Did you mean 'key_dim', the size of one head: qkv_features //"),
    ("nnx", {"key_mask": None}, "got key_mask, which is an argument of the call"),
    ("init_params", {"kernel_init": "zeros"}, "'kernel_init'. Did you mean 'kernel_initializer'?"),
    ("init_params", {"cache": None}, "init_params() got cache, which is an argument of the call"),
    ("call", {"num_heads": 4}, "sizes are read off params, as init_params(..., num_heads=...)"),
    ("call", {"deterministic": True}, "'training', its opposite? That one makes a layer"),
    ("call", {"is_causal": True}, "Did you mean 'use_causal_mask'? It takes params, query"),
    ("call", {"sliding_windw": 3}, "Did you mean 'sliding_window'?"),
    ("call", {"tap": None}, "Did you mean 'on_projection'?"),
]


@pytest.mark.parametrize("door, given, message", UNKNOWN)
def test_names_from_elsewhere(door, given, message):
    with pytest.raises(ArgumentError) as caught:
        (DOORS | CALL_DOORS)[door](given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"deterministic": True}, "Did you mean 'training', its opposite?"),
        ({"is_causal": True}, "Did you mean 'use_causal_mask'?"),
        ({"inputs_kv": X}, "It takes query, value, key,"),
        ({"key_padding_mask": None}, "Did you mean 'key_mask', where True means a real token?"),
        ({"need_weights": True}, "Did you mean 'return_attention_scores'?"),
        (
            {"segment_ids": None},
            "'query_tokens', mj.Tokens.packed(ids), with mask=mj.SameSegment()?",
        ),
        ({"position_ids": None}, "Did you mean 'query_tokens', mj.Tokens(T, pos=positions)?"),
        (
            {"use_cache": True},
            "'cache', what layer.empty_cache(batch, capacity) or the call before",
        ),
        ({"attn_bias": None}, "Did you mean 'bias'?"),
        ({"softcap": 50.0}, "Did you mean 'logit_cap'? That one is an argument of the constructor"),
        ({"window_size": 4}, "Did you mean 'sliding_window', which counts oneself: w + 1?"),
        ({"dropout": 0.1}, "an argument of the constructor, not of the call: MultiHeadAttention"),
        ({"use_casual_mask": True}, "Did you mean 'use_causal_mask'?"),
    ],
)
def test_names_from_elsewhere_in_the_call_of_a_module(given, message):
    for call in (lambda **o: LINEN.apply(VARIABLES, X, Y, **o), lambda **o: NNX(X, Y, **o)):
        with pytest.raises(ArgumentError, match=r"^MultiHeadAttention\.__call__\(\) got") as caught:
            call(**given)
        assert message in str(caught.value)


OF_TORCH = (
    "embed_dim num_heads dropout bias add_bias_kv add_zero_attn kdim vdim batch_first device dtype",
    "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal",
)
THEIRS = {
    "keras": (keras.layers.MultiHeadAttention.__init__, keras.layers.MultiHeadAttention.call),
    "linen": (nn.MultiHeadDotProductAttention, nn.MultiHeadDotProductAttention.__call__),
    "nnx": (nnx.MultiHeadAttention.__init__, nnx.MultiHeadAttention.__call__),
}


def names_of(function):
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    parameters = inspect.signature(function).parameters.values()
    # Metadata of parameters are nnx's own, and others in every version.
    other = ("self", "parent", *(p.name for p in parameters if p.name.endswith("_metadata")))
    return [p.name for p in parameters if p.kind not in kinds and p.name not in other]


@pytest.mark.parametrize("whose", [*THEIRS, "torch"])
def test_every_name_of_a_peer_is_taken_or_answered(whose):
    if whose == "torch":
        made, called = (names.split() for names in OF_TORCH)
    else:
        made, called = map(names_of, THEIRS[whose])
    for name in {*made} - {*FIELDS, "name"}:
        with pytest.raises(ArgumentError, match=r"Did you mean|Leave it out"):
            mj.MultiHeadAttention(**more({name: None}))
    for name in {*called} - {*names_of(NNX.__call__)}:
        for call in (lambda **o: LINEN.apply(VARIABLES, X, Y, **o), lambda **o: NNX(X, Y, **o)):
            with pytest.raises(ArgumentError, match=r"Did you mean|Leave it out"):
                call(**{name: None})


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"bias": False},
            r"argument of the call.*in flax\.nnx\. Did you mean 'use_bias', for biases of",
        ),
        ({"kdim": 3}, r"'kdim'\. Leave it out: widths are read off the inputs\.$"),
        ({"batch_first": True}, r"Leave it out: inputs are always \[batch, length, features\]"),
        ({"d_model": 12}, "'key_dim', the size of one head: d_model // num_heads"),
        ({"hidden_size": 12}, "'key_dim', the size of one head: hidden_size // num_heads"),
        ({"in_features": 12}, "'in_features'. Leave it out: .* but in mj.nnx.MultiHeadAttention"),
        ({"rngs": None}, "'rngs'. Leave it out: .* but in mj.nnx.MultiHeadAttention"),
        (
            {"padding_mask": None},
            "'value_mask', where True .*? That one is an argument of the call",
        ),
    ],
)
def test_names_from_elsewhere_in_the_constructor(given, message):
    with pytest.raises(ArgumentError, match=message):
        mj.MultiHeadAttention(**more(given))


def test_a_config_says_what_was_meant():
    with pytest.raises(WeightsError, match=r"unknown key 'dropout_rate'.* Did you mean 'dropout'"):
        mj.MultiHeadAttention.from_config({"num_heads": 2, "key_dim": 4, "dropout_rate": 0.1})
    with pytest.raises(mj.ShapeError, match="dtype must be a floating-point dtype"):
        mj.MultiHeadAttention.from_config({"num_heads": 2, "key_dim": 4, "dtype": "int8"})


def test_signatures_show_every_argument():
    names = list(FIELDS)
    defaults = {name: field.default for name, field in FIELDS.items()}
    for door in (mj.MultiHeadAttention, mj.nnx.MultiHeadAttention, mj.init_params):
        shown = inspect.signature(door).parameters
        assert [name for name in shown if name in FIELDS] == names
        for name in names:
            default = shown[name].default
            default = dataclasses.MISSING if default is inspect.Parameter.empty else default
            assert default is defaults[name]
    shown = inspect.signature(mj.multi_head_attention).parameters
    assert [name for name in shown if name in OF_CALL] == list(OF_CALL)
    for call in (mj.MultiHeadAttention.__call__, NNX.__call__, mj.multi_head_attention):
        kinds = {p.kind for p in inspect.signature(call).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert inspect.signature(LINEN) == inspect.signature(LINEN.__call__)


def test_signatures_of_a_class_of_the_users_own():
    class Mine(mj.MultiHeadAttention):
        extra: int = 3

    assert "extra" in inspect.signature(Mine).parameters
    assert Mine(**LEAST, extra=5).extra == 5
    with pytest.raises(ArgumentError, match=r"Mine\(\) got an unexpected .* 'extras'.* 'extra'"):
        Mine(**LEAST, extras=5)


def test_every_argument_is_explained_in_every_docstring():
    for cls in (Arguments, mj.MultiHeadAttention, mj.nnx.MultiHeadAttention):
        text = inspect.getdoc(cls).partition("Args:")[2].partition("Raises:")[0]
        missing = [name for name in FIELDS if f" {name}:" not in text and f" {name}," not in text]
        assert not missing, cls


def test_what_is_stored():
    given = {
        "num_heads": np.int64(4),
        "dropout": np.float32(0.25),
        "use_bias": np.bool_(False),
        "output_shape": 3,
        "attention_axes": [-2],
        "kernel_regularizer": "l2",
        "seed": np.uint8(7),
    }
    for layer in (DOORS["linen"](given), DOORS["nnx"](given), made_of_a_config(given)):
        assert (layer.output_shape, layer.attention_axes, layer.seed) == ((3,), (-2,), 7)
        assert type(layer.num_heads) is int and type(layer.dropout) is float
        assert layer.use_bias is False and layer.kernel_regularizer == mj.regularizers.L2()
    assert made_of_a_config(given).get_config() == DOORS["linen"](given).get_config()
    assert made_of_a_config({}).linen == LINEN


def test_a_layer_is_read_off_its_parameters():
    given = {"value_dim": 5, "num_kv_heads": 2, "output_shape": (3, 2), "use_gate": True}
    params = mj.init_params(jax.random.key(0), X, Y, **more(given))
    layer = Arguments.of(params, {"sliding_window": np.int32(3)})
    assert {name: getattr(layer, name) for name in given} == given
    assert layer.use_bias and layer.sliding_window == 3
    shapes = {name: shape.kernel for name, shape in layer.shapes(D, D, D).items()}
    assert shapes == {name: own["kernel"].shape for name, own in params.items()}
