"""Masks: a lazy algebra of rules on (query token, key token) that never becomes T x S.

A mask says `visible`: may this query token attend to this key token? It is written with operators
only, so that NumPy arrays, tracers and values inside a kernel all work, and with
facts that broadcast, so that it neither knows nor cares how a tile is laid out. It may also say
`reach`: what is certain about a whole tile, from the intervals of its facts. A tile where no pair
is visible is skipped, one where every pair is runs unmasked. `&`, `|` and `~` combine both.

Every array leaf of a mask broadcasts to [#B, #N, #T, #S]: the booleans of `Dense`, the lengths of `PrefixLM`.
A tile of a mask is `jax.tree.map(cut, mask)`. `True` means "may attend". A row that sees nothing gives zeros.

To add a mask: subclass `Mask`, register it as a pytree with static fields, write `visible`.

>>> mask = Causal() & ~Window(0, 0)          # the past, without oneself
>>> mask.matrix(Tokens(3), Tokens(3)).astype(int).tolist()
[[0, 0, 0], [1, 0, 0], [1, 1, 0]]
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import dataclass_transform

from mha_jax.attention.brief import alike, brief
from mha_jax.attention.given import is_integer, of_kind
from mha_jax.attention.tokens import Facts, Tokens
from mha_jax.errors import ShapeError
from mha_jax.types import ArrayLike, Bool

_Class = TypeVar("_Class", bound=type)


def static(**options: Any) -> Any:
    """Declare a field that is part of a mask's type, not an array."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True)
def pytree(cls: _Class) -> _Class:
    """Make a class a frozen dataclass, printed without the numbers of its arrays, and a pytree."""
    if "__repr__" not in vars(cls):
        cls.__repr__ = brief  # pyright: ignore[reportAttributeAccessIssue]
    if "__eq__" not in vars(cls):
        cls.__eq__ = alike  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, repr=False)(cls))


class Reach(NamedTuple):
    """What is certain about a tile: `some` pair may be visible; `every` pair surely is.

    Sound means: no pair is visible where `some` is False, all are where `every` is True.
    """

    some: Any
    every: Any

    def __and__(self, other: "Reach") -> "Reach":  # type: ignore[override]
        return Reach(self.some & other.some, self.every & other.every)

    def __or__(self, other: "Reach") -> "Reach":
        return Reach(self.some | other.some, self.every | other.every)

    def __invert__(self) -> "Reach":
        return Reach(True ^ self.every, True ^ self.some)  # ~True is a number


def check_mask(name: str, mask: Any) -> None:
    """Refuse what is no rule.

    Raises:
      ShapeError: Saying how to write one.
    """
    if not isinstance(mask, Mask):
        raise ShapeError(
            f"{name} must be a Mask: got {mask if isinstance(mask, type) else type(mask).__name__}. Write a "
            "rule, Causal() or Window(4, 0) & ValidKeys() say; an array of booleans is Dense(array), "
            "or attention_mask= of the layer."
        )


def _rule(other: Any) -> "Mask":
    """Return what stands beside a mask in `&` or `|` as a mask: an array is a `Dense` one."""
    if isinstance(other, (jax.Array, np.ndarray)):
        return Dense(other)
    check_mask("what is combined with a mask", other)
    return other


ANYTHING = Reach(np.True_, np.False_)
EVERYTHING = Reach(np.True_, np.True_)


class Mask:
    """A rule on (query token, key token).

    `&`, `|` and `~` combine rules, and rules with boolean arrays, [T, S] or [*B, N, T, S] say.

    >>> (np.eye(2, dtype=bool) | Causal()).matrix(Tokens(2), Tokens(2)).astype(int).tolist()
    [[1, 0], [1, 1]]
    """

    # Whether its arrays are numbers of their own meaning; those of other masks are truth values.
    holds_numbers: ClassVar[bool] = False
    __array_ufunc__ = None  # NumPy leaves `array & mask` to the mask

    def visible(self, q: Facts, k: Facts) -> Any:
        """Return booleans that broadcast to the tile: True where the query may attend to the
        key."""
        raise NotImplementedError

    def reach(self, q: Facts, k: Facts) -> Reach:
        """Return what is certain about tiles whose facts are intervals; saying nothing is sound."""
        return ANYTHING

    @property
    def behind(self) -> int | None:
        """How many positions before its own a query may look at most; None without a known limit."""
        return None

    @property
    def hides_invalid_keys(self) -> bool:
        """Whether keys with `valid` False can surely not be seen by any query."""
        return False

    @property
    def hides_invalid_queries(self) -> bool:
        """Whether queries with `valid` False surely see no key."""
        return False

    def matrix(self, q: Tokens, k: Tokens) -> Bool[np.ndarray, "*B T S"]:
        """Return the mask as NumPy, [T, S] or [#B, #N, T, S]: to look at, not to compute with.

        Raises:
          ShapeError: If `q` or `k` are no tokens.
        """
        for name, tokens in (("q", q), ("k", k)):
            of_kind(name, tokens, Tokens, "Pass mj.Tokens(length, start=..., segment=...).")
        mask = jax.tree.map(
            lambda a: a if isinstance(a, Mask) else np.asarray(a, bool),
            self,
            is_leaf=lambda a: isinstance(a, Mask) and a.holds_numbers,
        )
        seen = np.asarray(mask.visible(q.as_queries(), k.as_keys()))
        shape = np.broadcast_shapes(seen.shape, (1, 1, q.length, k.length))
        seen = np.broadcast_to(seen, shape)
        return seen[0, 0] if shape[:2] == (1, 1) else seen

    def __and__(self, other: "Mask | ArrayLike") -> "Mask":
        other = _rule(other)
        if isinstance(other, Full):
            return self
        return other if isinstance(self, Full) else And(self, other)

    def __or__(self, other: "Mask | ArrayLike") -> "Mask":
        return Or(self, _rule(other))

    def __rand__(self, other: ArrayLike) -> "Mask":
        return _rule(other) & self

    def __ror__(self, other: ArrayLike) -> "Mask":
        return _rule(other) | self

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise ShapeError(
            f"{type(self).__name__} is a rule, neither true nor false: `and`, `or`, `not` and `if` cannot "
            "read it. Combine rules by `&`, `|` and `~`; ask `mask is None` for a missing one."
        )


@pytree
class Full(Mask):
    """Every query sees every key."""

    def visible(self, q, k):
        return np.True_

    def reach(self, q, k):
        return EVERYTHING


@pytree
class Causal(Mask):
    """A query sees the keys at its own position and before.

    From the top left when T != S, as Keras; `Tokens(T, start=S - T)` aligns at the bottom right.
    """

    def visible(self, q, k):
        return q.positions >= k.positions

    def reach(self, q, k):
        (q_low, q_high), (k_low, k_high) = q.positions, k.positions
        return Reach(q_high >= k_low, q_low >= k_high)


_LOW, _HIGH = np.iinfo(np.int32).min, np.iinfo(np.int32).max
_SPAN = 2**32 - 1  # from the lowest to the highest position


def _plus(position: Any, steps: int) -> Any:
    """Return position + steps, or the highest position where that is beyond it; steps >= 0."""
    steps = min(steps, _SPAN)
    most = np.int32(_HIGH - steps)
    xp: Any = jnp if isinstance(position, jax.Array) else np
    return xp.minimum(position, most) + _word(steps) if steps else position


def _minus(position: Any, steps: int) -> Any:
    """Return position - steps, or the lowest position where that is beyond it; steps >= 0."""
    steps = min(steps, _SPAN)
    least = np.int32(_LOW + steps)
    xp: Any = jnp if isinstance(position, jax.Array) else np
    return xp.maximum(position, least) - _word(steps) if steps else position


def _word(steps: int) -> np.int32:
    """Return a count of steps modulo 2**32."""
    return np.uint32(steps).astype(np.int32)


@pytree
class Window(Mask):
    """A query sees `left` keys before its position, its own, and `right` keys after it.

    Keras's `sliding_window=w` is `Window(w - 1, w - 1)`; jax.nn's `local_window_size=(l, r)` is
    `Window(l, r)`. A negative size excludes: `Window(-1, r)` does not see its own position.
    """

    left: int = static()
    right: int = static()

    def __post_init__(self):
        for name, size in (("left", self.left), ("right", self.right)):
            if not is_integer(size):
                raise ShapeError(
                    f"Window counts keys on each side: got {name}={size!r}. Expected an integer; for no "
                    "limit on one side pass a size larger than any sequence."
                )
            object.__setattr__(self, name, int(size))

    @property
    def behind(self):
        return max(self.left, 0)

    def visible(self, q, k):
        return self._after(q.positions, k.positions) & self._before(q.positions, k.positions)

    def reach(self, q, k):
        (q_low, q_high), (k_low, k_high) = q.positions, k.positions
        some = self._after(q_low, k_high) & self._before(q_high, k_low)
        every = self._after(q_high, k_low) & self._before(q_low, k_high)
        return Reach(some & (self.left + self.right >= 0), every)

    # No difference of two positions is taken: it may leave 32 bits. A row's first and last visible position
    # are, and stop at the ends, where a comparison says the same of every position there is.

    def _after(self, q, k):
        """Whether k >= q - left."""
        if self.left < 0:
            return k > _plus(q, -self.left - 1)
        return k >= _minus(q, self.left)

    def _before(self, q, k):
        """Whether k <= q + right."""
        if self.right < 0:
            return k < _minus(q, -self.right - 1)
        return k <= _plus(q, self.right)


@pytree
class SameSegment(Mask):
    """A query sees the keys of its own packed sequence; a negative segment is padding, never
    seen.

    `SameSegment() & Causal()` on `Tokens.packed(ids)` is the mask of documents.
    """

    def visible(self, q, k):
        return (q.segment == k.segment) & (k.segment >= 0)

    def reach(self, q, k):
        (q_low, q_high), (k_low, k_high) = q.segment, k.segment
        overlap = (q_low <= k_high) & (k_low <= q_high) & (q_high >= 0) & (k_high >= 0)
        return Reach(overlap, (q_low == k_high) & (k_low == q_high) & (q_low >= 0) & (k_low >= 0))


@pytree
class ValidKeys(Mask):
    """No query sees a key whose token is not valid."""

    def visible(self, q, k):
        return np.True_ if k.valid is None else k.valid

    def reach(self, q, k):
        return EVERYTHING if k.valid is None else Reach(k.valid[1], k.valid[0])

    @property
    def hides_invalid_keys(self):
        return True


@pytree
class ValidQueries(Mask):
    """A query whose token is not valid sees nothing."""

    def visible(self, q, k):
        return np.True_ if q.valid is None else q.valid

    def reach(self, q, k):
        return EVERYTHING if q.valid is None else Reach(q.valid[1], q.valid[0])

    @property
    def hides_invalid_queries(self):
        return True


@pytree
class Dense(Mask):
    """An explicit boolean array: the only mask that costs T x S memory, and the caller pays it."""

    array: Bool[ArrayLike, "#B #N #T #S"]

    def visible(self, q, k):
        return self.array


@pytree
class And(Mask):
    """Visible where both are."""

    a: Mask
    b: Mask

    def visible(self, q, k):
        return self.a.visible(q, k) & self.b.visible(q, k)

    def reach(self, q, k):
        return self.a.reach(q, k) & self.b.reach(q, k)

    @property
    def behind(self):
        known = [mask.behind for mask in (self.a, self.b) if mask.behind is not None]
        return min(known, default=None)

    @property
    def hides_invalid_keys(self):
        return self.a.hides_invalid_keys or self.b.hides_invalid_keys

    @property
    def hides_invalid_queries(self):
        return self.a.hides_invalid_queries or self.b.hides_invalid_queries


@pytree
class Or(Mask):
    """Visible where at least one is."""

    a: Mask
    b: Mask

    def visible(self, q, k):
        return self.a.visible(q, k) | self.b.visible(q, k)

    def reach(self, q, k):
        return self.a.reach(q, k) | self.b.reach(q, k)

    @property
    def behind(self):
        a, b = self.a.behind, self.b.behind
        return None if a is None or b is None else max(a, b)

    @property
    def hides_invalid_keys(self):
        return self.a.hides_invalid_keys and self.b.hides_invalid_keys

    @property
    def hides_invalid_queries(self):
        return self.a.hides_invalid_queries and self.b.hides_invalid_queries


@pytree
class Not(Mask):
    """Visible where `a` is not."""

    a: Mask

    def visible(self, q, k):
        return ~self.a.visible(q, k)

    def reach(self, q, k):
        return ~self.a.reach(q, k)
