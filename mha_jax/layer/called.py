"""What a call of the layer returns, for type checkers: with scores, with a cache, with both.

A signature for each of the three doors, linen, nnx and the function; at run time they are what they are.
"""

from collections.abc import Callable
from typing import (
    Any,
    Generic,
    Literal,
    Never,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
    runtime_checkable,
)

from mha_jax.attention.biases import Bias
from mha_jax.attention.cache import Cache
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.types import Array, ArrayLike, DType, Flags, Params, Precision

_Flags: TypeAlias = Flags | None


class _Options(TypedDict, total=False):
    query_mask: _Flags
    value_mask: _Flags
    key_mask: _Flags
    attention_mask: ArrayLike | None
    use_causal_mask: bool
    mask: Mask | None
    query_tokens: Tokens | None
    key_tokens: Tokens | None
    bias: Bias | ArrayLike | None
    on_projection: Callable[[str, Array], Array] | None


_Rngs = TypeVar("_Rngs")


class _OfModule(_Options, Generic[_Rngs], total=False):
    training: bool | None
    rngs: _Rngs


class _OfFunction(_Options, total=False):
    dropout: Dropout | None
    attention_axes: int | tuple[int, ...] | None
    sliding_window: int | None
    backend: Any
    dtype: DType
    precision: Precision
    rotary: Any
    qk_norm: Any
    scale: Any
    logit_cap: float | None


@runtime_checkable
class OfModule(Protocol[_Rngs]):
    """The call of `mj.MultiHeadAttention` and of `mj.nnx.MultiHeadAttention`, which takes `rngs`."""

    @overload
    def __call__(
        self,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: Literal[False] = False,
        cache: None = None,
        **options: Unpack[_OfModule[_Rngs]],
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: Literal[True],
        cache: None = None,
        **options: Unpack[_OfModule[_Rngs]],
    ) -> tuple[Array, Array]: ...

    @overload
    def __call__(
        self,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: Literal[False] = False,
        cache: Cache,
        **options: Unpack[_OfModule[_Rngs]],
    ) -> tuple[Array, Cache]: ...

    @overload
    def __call__(
        self,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: Literal[True],
        cache: Cache,
        **options: Unpack[_OfModule[_Rngs]],
    ) -> tuple[Array, Array, Cache]: ...

    @overload
    def __call__(
        self,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: bool = False,
        cache: Cache | None = None,
        **options: Unpack[_OfModule[_Rngs]],
    ) -> Any: ...


OfLinen: TypeAlias = OfModule[Never]
OfNnx: TypeAlias = OfModule[Any]


@runtime_checkable
class OfFunction(Protocol):
    """`mj.multi_head_attention`."""

    @overload
    def __call__(
        self,
        params: Params,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: Literal[False] = False,
        cache: None = None,
        **options: Unpack[_OfFunction],
    ) -> Array: ...

    @overload
    def __call__(
        self,
        params: Params,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: Literal[True],
        cache: None = None,
        **options: Unpack[_OfFunction],
    ) -> tuple[Array, Array]: ...

    @overload
    def __call__(
        self,
        params: Params,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: Literal[False] = False,
        cache: Cache,
        **options: Unpack[_OfFunction],
    ) -> tuple[Array, Cache]: ...

    @overload
    def __call__(
        self,
        params: Params,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: Literal[True],
        cache: Cache,
        **options: Unpack[_OfFunction],
    ) -> tuple[Array, Array, Cache]: ...

    @overload
    def __call__(
        self,
        params: Params,
        query: ArrayLike,
        value: ArrayLike | None,
        key: ArrayLike | None = None,
        *masks: _Flags,
        return_attention_scores: bool = False,
        cache: Cache | None = None,
        **options: Unpack[_OfFunction],
    ) -> Any: ...


def as_linen(function: Callable[..., Any]) -> OfLinen:
    """Tell type checkers how linen's layer is called; the function is as it was."""
    return cast(OfLinen, function)


def as_nnx(function: Callable[..., Any]) -> OfNnx:
    """Tell type checkers how nnx's layer is called; the function is as it was."""
    return cast(OfNnx, function)


def as_function(function: Callable[..., Any]) -> OfFunction:
    """Tell type checkers how the layer's function is called; it is as it was."""
    return cast(OfFunction, function)
