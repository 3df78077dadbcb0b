"""What Flax's attention layers pass to their `attention_fn`, as parts of a call.

`flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention` take a function in place of
their own `dot_product_attention`. linen passes those of its keywords that `inspect.signature` shows and
drops the others without a word, nnx passes all: so the function must show every name, and each must
mean here what it means there, or be refused.

Two answers differ by design: a query that may attend to nothing gives zeros here and the mean of all
values in Flax, and the bits of the dropout are those of `mha_jax.attention.dropout`.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import TypedDict

from mha_jax.attention.biases import Bias
from mha_jax.attention.call import Call
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.given import as_array, floating, switch
from mha_jax.attention.masks import Causal, Dense, pytree
from mha_jax.errors import ArgumentError, ShapeError, UnsupportedError
from mha_jax.types import Array, DType, PRNGKey

_Function = TypeVar("_Function")


class FlaxArguments(TypedDict, total=False):
    """The keywords of Flax's `dot_product_attention` that are not ours, with Flax's meaning.

    Args:
      broadcast_dropout: Whether all examples and heads drop the same weights; True if left out.
      dropout_rng: Key of the dropout.
      dropout_rate: Share of the weights to drop, unless `deterministic`.
      deterministic: Whether nothing is dropped.
      dtype: Of the computation; that of query, key and value together if None.
      module: The layer in whose intermediates the weights before dropout are sown.
      is_causal: Hide keys after the query, as `mask=Causal()`.
      force_fp32_for_softmax: Changes nothing: the softmax is never narrower than float32.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum, promote_dtype: Refused
        unless None.
    """

    broadcast_dropout: bool
    dropout_rng: PRNGKey | None
    dropout_rate: float
    deterministic: bool
    dtype: DType
    module: Any
    is_causal: bool
    force_fp32_for_softmax: bool
    einsum_dot_general: Any
    qk_attn_weights_einsum: Any
    attn_weights_value_einsum: Any
    promote_dtype: Any


_NAMES = tuple(FlaxArguments.__annotations__)
# What other libraries, and the layer, call what is said otherwise here.
_SEEN = "pass mask=, where True means that a query may attend, and numbers that are added as bias="
_LENGTHS = "pass mask=ValidKeys(), key_tokens=Tokens(S, valid=jnp.arange(S) < lengths[:, None])"
_DROPPED = "pass dropout=Dropout(key, rate)"
_SCORES = "call attention_scores(Call(q, k, v, ...))"
_ELSEWHERE = {
    "attn_mask": _SEEN,
    "attention_mask": _SEEN,
    "key_padding_mask": _LENGTHS,
    "key_mask": _LENGTHS,
    "value_mask": _LENGTHS,
    "key_value_seq_lengths": _LENGTHS,
    "query_mask": "pass mask=ValidQueries(), query_tokens=Tokens(T, valid=flags)",
    "query_seq_lengths": "pass mask=ValidQueries(), query_tokens=Tokens(T, valid=...)",
    "causal": "pass mask=Causal()",
    "use_causal_mask": "pass mask=Causal()",
    "local_window_size": "pass mask=Window(left, right)",
    "window_size": "pass mask=Window(left, right)",
    "sliding_window": "pass mask=Window(w - 1, w - 1)",
    "segment_ids": "pass mask=SameSegment(), query_tokens= and key_tokens=Tokens.packed(ids)",
    "dropout_p": _DROPPED,
    "training": _DROPPED,
    "return_attention_scores": _SCORES,
    "need_weights": _SCORES,
    "return_residual": "call attend(Call(q, k, v, ...)), whose second result it is",
    "softmax_scale": "pass scale=",
    "sm_scale": "pass scale=",
    "softcap": "pass logit_cap=",
    "logits_soft_cap": "pass logit_cap=",
    "implementation": "pass backend=",
    "enable_gqa": "leave it out: fewer heads in key and value than in query are groups",
}
_REFUSED = (
    "einsum_dot_general",
    "qk_attn_weights_einsum",
    "attn_weights_value_einsum",
    "promote_dtype",
)


@pytree
class SharedDropout(Dropout):
    """Dropout of the same weights in every example and head: Flax's `broadcast_dropout`.

    Its bits are those of the first example and head of `Dropout`.

    >>> shared = SharedDropout(jax.random.key(0), 0.5)
    >>> keep = shared.keep(2, 3, jnp.arange(4)[None], jnp.arange(5)[None])
    >>> keep.shape, bool((keep == keep[:1, :1]).all())
    ((2, 3, 4, 5), True)
    """

    def row_keys(self, batch, heads, rows):
        length = rows.shape[1]
        first = Dropout(self.key, self.rate).row_keys(1, 1, rows.reshape(1, -1))
        a, c = (
            jnp.broadcast_to(word.reshape(-1, 1, length), (batch, heads, length)) for word in first
        )
        return a, c


def shows_flax_arguments(function: _Function) -> _Function:
    """Let `inspect.signature` of a function with `**flax` show the names of FlaxArguments."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _NAMES
    ]
    function.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
    return function


def with_flax_arguments(call: Call, flax: FlaxArguments) -> Call:
    """Return an unchecked call with Flax's arguments carried out.

    A mask array and a bias are aligned at their last axes, as NumPy does it, and a mask of numbers is
    True where they are not 0: so they mean what they mean in Flax.

    Raises:
      ShapeError: If the dropout is given twice, or has no key.
    """
    for name in ("is_causal", "deterministic", "broadcast_dropout"):
        if flax.get(name) is not None:
            switch(name, flax.get(name))
    if flax.get("dtype") is not None:
        floating("dtype", flax.get("dtype"))
    if flax.get("module") is not None and not hasattr(flax.get("module"), "sow"):
        raise ShapeError(
            f"module must be a Flax module, which keeps the scores: got {flax.get('module')!r}. Pass None to "
            "keep none."
        )
    for name in "qkv":
        as_array({"q": "query", "k": "key", "v": "value"}[name], getattr(call, name), "an array")
    mask, bias, rank = call.mask, call.bias, jnp.ndim(call.q)
    if isinstance(mask, Dense):
        mask = Dense(_aligned(jnp.asarray(mask.array).astype(bool), rank))
    if flax.get("is_causal"):
        mask = mask & Causal()
    dtype = flax.get("dtype")
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(call.q, call.k, call.v)
    return dataclasses.replace(
        call,
        q=jnp.asarray(call.q, dtype),
        k=jnp.asarray(call.k, dtype),
        v=jnp.asarray(call.v, dtype),
        mask=mask,
        bias=bias if bias is None or isinstance(bias, Bias) else _aligned(jnp.asarray(bias), rank),
        dropout=_dropout(call, flax),
    )


def sow(module: Any, scores: Array) -> None:
    """Keep scores in the intermediates of a linen or nnx module, under Flax's name."""
    if isinstance(module, nn.Module):
        module.sow("intermediates", "attention_weights", scores)
        return
    from flax import nnx

    module.sow(nnx.Intermediate, "attention_weights", scores)


def check_names(function: Callable[..., Any], flax: FlaxArguments) -> None:
    """Refuse what is neither an argument of a function of ours nor one that Flax's layers pass.

    Raises:
      ArgumentError: Saying what it is here, or what may be meant.
      UnsupportedError: If an argument would replace the products of attention.
    """
    for name, value in flax.items():
        if name not in _NAMES:
            known = list(inspect.signature(function).parameters)
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if name in _ELSEWHERE:
                hint = f" Here {_ELSEWHERE[name]}."
            raise ArgumentError(
                f"{function.__name__}() got an unexpected keyword argument {name!r}.{hint} It takes "
                f"{', '.join(known)}."
            )
        if name in _REFUSED and value is not None:
            raise UnsupportedError(
                f"{name} would replace the products of attention, which are the backend's own: got "
                f"{value!r}. Leave it unset in the Flax layer (its projections may keep their "
                "dot_general), or use Flax's own dot_product_attention."
            )


def _dropout(call: Call, flax: FlaxArguments) -> Dropout | None:
    rate, rng = flax.get("dropout_rate", 0.0), flax.get("dropout_rng")
    if isinstance(rate, (jax.Array, np.ndarray)):
        raise ShapeError(
            f"dropout_rate must be a number in [0, 1): got {rate.dtype}{list(rate.shape)}. It is the share "
            "of attention weights to drop, a Python number."
        )
    if flax.get("deterministic", False) or rate == 0:
        return call.dropout
    if call.dropout is not None:
        raise ShapeError(
            f"dropout was given twice: with rate {call.dropout.rate} as dropout= and as "
            f"dropout_rate={rate}. "
            "Pass dropout=Dropout(key, rate), or Flax's dropout_rate and dropout_rng."
        )
    if rng is None:
        raise ShapeError(
            f"dropout needs a key: got dropout_rate={rate} and deterministic=False with "
            "dropout_rng=None. Pass dropout_rng=jax.random.key(0), a new key for every step, or "
            "deterministic=True."
        )
    return SharedDropout(rng, rate) if flax.get("broadcast_dropout", True) else Dropout(rng, rate)


def _aligned(a: Array, rank: int) -> Array:
    return a.reshape((1,) * (rank - a.ndim) + a.shape)
