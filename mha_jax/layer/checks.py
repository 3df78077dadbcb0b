"""Checks of the layer's arguments, at every door the same: (name, value) -> the value as it is stored.

NumPy's scalars become Python's, lists tuples. What cannot be meant is a `ShapeError` that names the argument,
says what was expected, and how to fix it.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mha_jax.attention.given import floating as floating
from mha_jax.attention.given import is_integer as is_integer
from mha_jax.attention.given import is_number
from mha_jax.attention.given import precision as precision
from mha_jax.attention.given import switch as switch
from mha_jax.attention.rotary import Rotary, from_plain
from mha_jax.errors import ArgumentError, ShapeError
from mha_jax.layer import vectors

_WIDTH = "It is the width, x.shape[-1], of what the layer will be called with."
_SIZE = "key_dim and value_dim are the sizes of one head; torch's embed_dim is num_heads * key_dim here."


def positive(name: str, x: Any, wanted: str = "a positive integer") -> int:
    """Return a positive integer."""
    if not is_integer(x) or not 0 < x < 2**31:
        hint = _WIDTH if name.endswith("_features") else _SIZE
        raise ShapeError(f"{name} must be {wanted}: got {x!r}. {hint}")
    return int(x)


def positive_or_none(name: str, x: Any) -> int | None:
    """Return a positive integer or None."""
    return None if x is None else positive(name, x, "a positive integer or None")


def switch_or_none(name: str, x: Any) -> bool | None:
    """Return a switch or None."""
    return None if x is None else switch(name, x, "True, False or None")


PROJECTIONS = ("query", "key", "value", "gate", "attention_output")


def biased(name: str, x: Any) -> bool | tuple[str, ...]:
    """Return True, False, or the names of the projections that have biases."""
    if not isinstance(x, (tuple, list, set, frozenset)):
        return switch(name, x, "True or False, or names of projections")
    unknown = [one for one in x if one not in PROJECTIONS]
    if unknown:
        raise ShapeError(
            f"{name} names the projections that have biases: got {unknown[0]!r}, expected some of "
            f"{', '.join(map(repr, PROJECTIONS))}. Qwen 2 has ('query', 'key', 'value')."
        )
    return tuple(one for one in PROJECTIONS if one in x) or False


def rotary_or_none(name: str, x: Any) -> Rotary | None:
    """Return rotary positions or None; those of a configuration as themselves."""
    if isinstance(x, Mapping):
        return from_plain(x)
    if x is None or isinstance(x, Rotary):
        return x
    raise ShapeError(
        f"{name} must be mj.Rotary(...) or None: got {x!r}. Pass rotary=mj.Rotary(base=10000.0); of a "
        "Hugging Face config, mj.Rotary.from_config(config)."
    )


def norm_or_none(name: str, x: Any) -> Any:
    """Return the name of a norm, a class that makes one, or None."""
    if x is None or (isinstance(x, str) and x in vectors.NORMS) or isinstance(_class(x), type):
        return x
    raise ShapeError(
        f"{name} must be one of {', '.join(map(repr, vectors.NORMS))}, a Flax module's class, or None: got "
        f"{x!r}. It is the norm of the projected queries and keys; a class may be in a functools.partial."
    )


def norm_made_by(library: str, module: type, norm: Any) -> None:
    """Refuse a norm that is the class of another library's module.

    Raises:
      ShapeError: Naming it.
    """
    if not vectors.of_modules(norm) or issubclass(_class(norm), module):
        return
    raise ShapeError(
        f"qk_norm must be the class of a {library} module here, or the name of a norm: got {norm!r}. Pass "
        f"{library}.RMSNorm, say, or one of {', '.join(map(repr, vectors.NORMS))}, which any layer takes."
    )


def _class(x: Any) -> Any:
    return getattr(x, "func", x)  # of a functools.partial


def function_or_none(name: str, x: Any) -> Any:
    """Return a function of a name and an array, or None."""
    if x is None or callable(x):
        return x
    raise ShapeError(
        f"{name} must be a function of a name and an array, or None: got {x!r}. It returns the array that is "
        "used."
    )


def scale_or_none(name: str, x: Any) -> Any:
    """Return a finite number, a function of positions, or None."""
    if x is None or (callable(x) and not isinstance(x, type)):
        return x
    if not is_number(x) or not math.isfinite(x):
        raise ShapeError(
            f"{name} must be a finite number, a function of the queries' positions, or None: got {x!r}. It "
            "multiplies queries times keys; None is 1 / sqrt(key_dim)."
        )
    return float(x)


def cap_or_none(name: str, x: Any) -> float | None:
    """Return a positive number or None."""
    if x is None:
        return None
    if not is_number(x) or not 0 < float(x) < math.inf:
        raise ShapeError(
            f"{name} must be a positive number or None: got {x!r}. Logits become {name} * tanh(x / {name}); "
            "Gemma 2 has 50.0."
        )
    return float(x)


def rate(name: str, x: Any) -> float:
    """Return a rate of dropout, a number in [0, 1)."""
    if not is_number(x) or not 0 <= float(x) < 1:
        raise ShapeError(
            f"{name} must be a number in [0, 1): got {x!r}. It is the share of attention weights to drop in "
            "training; 0.0 drops none."
        )
    return float(x)


def seed(name: str, x: Any) -> int | None:
    """Return the seed of a key, an integer that `jax.random.key` takes, or None."""
    if x is not None and (not is_integer(x) or not -(2**63) <= x < 2**63):
        raise ShapeError(
            f"{name} must be an integer or None, of at most 64 bits: got {x!r}. "
            'To drop with a key of your own, pass rngs={"dropout": key} to apply.'
        )
    return None if x is None else int(x)


def sizes_or_none(name: str, x: Any) -> tuple[int, ...] | None:
    """Return positive sizes as a tuple, or None."""
    sizes = (x,) if is_integer(x) else x
    if sizes is None:
        return None
    listed = isinstance(sizes, (tuple, list)) and len(sizes) > 0
    if not listed or not all(is_integer(size) and 0 < size < 2**31 for size in sizes):
        raise ShapeError(
            f"{name} must be a positive integer, a tuple of them, or None: got {x!r}. "
            "It is the shape of the output's features, without batch and sequence axes."
        )
    return tuple(int(size) for size in sizes)


def axes_or_none(name: str, x: Any) -> tuple[int, ...] | None:
    """Return axes as a tuple, or None."""
    axes = (x,) if is_integer(x) else x
    if axes is None:
        return None
    if not isinstance(axes, (tuple, list)) or not axes or not all(map(is_integer, axes)):
        raise ShapeError(
            f"{name} must be an integer, a tuple of integers, or None: got {x!r}. "
            "They are the axes of the input to attend over."
        )
    return tuple(int(axis) for axis in axes)


def floating_or_none(name: str, x: Any) -> Any:
    """Return a dtype, as it was given, or None."""
    return None if x is None else floating(name, x, "a floating-point dtype or None")


def merged(name: str, field: bool | None, argument: Any) -> bool:
    """Return a switch given to the layer or to the call; unset means False.

    Raises:
      ShapeError: If it was given to both, or is no switch.
    """
    argument = switch_or_none(name, argument)
    if field is not None and argument is not None:
        raise ShapeError(
            f"{name} was given to the layer ({field}) and to the call ({argument}). Give it to one of them."
        )
    return bool(field if argument is None else argument)


# What other libraries call an argument, and what more to say of it.
_ELSEWHERE = {
    "deterministic": ("training", "its opposite"),
    "is_causal": ("use_causal_mask", ""),
    "causal": ("use_causal_mask", ""),
    "decode": ("cache", "which holds the tokens before"),
    "dropout_rate": ("dropout", ""),
    "attention_dropout": ("dropout", ""),
    "dropout_p": ("dropout", ""),
    "broadcast_dropout": ("dropout", "which is never broadcast here"),
    "qkv_features": ("key_dim", "the size of one head: qkv_features // num_heads"),
    "embed_dim": ("key_dim", "the size of one head: embed_dim // num_heads"),
    "head_dim": ("key_dim", ""),
    "hidden_size": ("key_dim", "the size of one head: hidden_size // num_heads"),
    "d_model": ("key_dim", "the size of one head: d_model // num_heads"),
    "out_features": ("output_shape", ""),
    "kernel_init": ("kernel_initializer", ""),
    "bias_init": ("bias_initializer", ""),
    "bias": ("use_bias", "for biases of the projections"),
    "add_bias_kv": ("", "keys and values have no token beside those of the inputs"),
    "add_zero_attn": ("", "keys and values have no token beside those of the inputs"),
    "kdim": ("", "widths are read off the inputs"),
    "vdim": ("", "widths are read off the inputs"),
    "in_features": ("", "widths are read off the inputs, but in mj.nnx.MultiHeadAttention"),
    "rngs": ("", "keys are given to init and apply, but in mj.nnx.MultiHeadAttention"),
    "batch_first": ("", "inputs are always [batch, length, features]"),
    "device": ("", "arrays say where they lie: jax.device_put(variables, device)"),
    "flash_attention": ("backend", "None, which takes the best"),
    "keep_rngs": ("", "keys of dropout are always kept"),
    "normalize_qk": ("qk_norm", "'layer' for Flax's"),
    "attention_fn": ("backend", ""),
    "promote_dtype": ("dtype", ""),
    "average_attn_weights": ("return_attention_scores", "of which scores.mean(1) is the average"),
    "init_cache": ("cache", "layer.empty_cache(batch, capacity)"),
    "padding_mask": ("value_mask", "where True means a real token"),
    "num_query_heads": ("num_heads", ""),
    "num_key_value_heads": ("num_kv_heads", ""),
    "inputs_q": ("query", ""),
    "inputs_k": ("key", ""),
    "inputs_v": ("value", ""),
    "inputs_kv": ("value", "which is key, too, unless that is given"),
    **dict.fromkeys(
        ("input_positions", "position_ids", "positions"),
        ("query_tokens", "mj.Tokens(T, pos=positions)"),
    ),
    **dict.fromkeys(
        ("segment_ids", "query_segment_ids", "decoder_segment_ids"),
        ("query_tokens", "mj.Tokens.packed(ids), with mask=mj.SameSegment()"),
    ),
    **dict.fromkeys(
        ("past_key_value", "past_key_values", "kv_cache", "use_cache"),
        ("cache", "what layer.empty_cache(batch, capacity) or the call before returned"),
    ),
    "attention_bias": ("bias", ""),
    "attn_bias": ("bias", ""),
    "softcap": ("logit_cap", ""),
    "window_size": ("sliding_window", "which counts oneself: w + 1"),
    "rope": ("rotary", "mj.Rotary()"),
    "out_kernel_init": ("kernel_initializer", "of all projections"),
    "out_bias_init": ("bias_initializer", "of all projections"),
    "force_fp32_for_softmax": ("", "the softmax is never narrower than float32"),
    "dropout_rng": (
        "",
        'the key is the stream "dropout" of rngs, or that of dropout=Dropout(key, rate) without a module',
    ),
    "out_sharding": ("", "outputs lie where their inputs do, jax.device_put moves them"),
    "qkv_sharding": ("", "projections lie where inputs and kernels do"),
    **dict.fromkeys(
        ("qkv_dot_general", "out_dot_general", "qkv_dot_general_cls", "out_dot_general_cls"),
        ("precision", "of the products, which are the layer's own"),
    ),
    **dict.fromkeys(
        ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"),
        ("backend", "whose products they are"),
    ),
    "attn_mask": ("attention_mask", "where True means that a query may attend"),
    "key_padding_mask": ("key_mask", "where True means a real token"),
    "need_weights": ("return_attention_scores", ""),
    "sow_weights": ("return_attention_scores", ""),
    "tap": ("on_projection", ""),
}


def refuse_unknown(
    function: Callable[..., Any], given: Iterable[str], other: Iterable[str], there: str
) -> None:
    """Refuse the arguments that a function or class of ours does not have.

    Args:
      function: What was called; it takes what its signature says.
      given: The arguments that were given by name.
      other: Arguments of another door of the layer.
      there: What to say of these, with a place for {name}.

    Raises:
      ArgumentError: Saying where the first unknown one belongs, or what may be meant.
    """
    owner, parameters = function.__qualname__, inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "parent"]
    name = next(name for name in given if name not in known)
    near, remark = _ELSEWHERE.get(name, ("", ""))
    if name in other:
        own = meant(name, ()) if near in known else ""  # torch's bias= is another one
        raise ArgumentError(f"{owner}() got {name}, which {there.format(name=name)}{own}")
    said = f"{owner}() got an unexpected keyword argument {name!r}."
    if remark and not near:
        raise ArgumentError(f"{said} Leave it out: {remark}.")
    if near not in known and near in other:
        raise ArgumentError(f"{said}{meant(name, ())} That one {there.format(name=near)}")
    raise ArgumentError(f"{said}{meant(name, known)} It takes {', '.join(known)}.")


def meant(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" for a name that is not known; nothing if no known one is near."""
    near, remark = _ELSEWHERE.get(name, ("", ""))
    if not near:
        near = next(iter(difflib.get_close_matches(name, list(known), 1)), "")
    return f" Did you mean {near!r}{', ' if remark else ''}{remark}?" if near else ""
