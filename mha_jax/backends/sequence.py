"""The tokens of an example over several devices: another backend, part by part, inside a `jax.shard_map`.

B batch   T query length   S key length   N query heads   K key-value heads   P parts, one a device
H query-key head size   V value head size; T and S are those of one device's shard

A device has a shard of the queries, keys and values of P, and the tokens of its shard: rows where they bring
an `index`, and those of the mesh's order, part after part, where they do not. So masks and dropout see global
rows, and know of no device.

* `Ring`: keys and values go round, one device further every turn, sent before the turn's product is taken, so
  that both overlap. Outputs are merged by (max, sum). Gradients of keys and values follow them, and arrive
  home. Turns in which no device sees anything are not taken, and a device computes the parts that it sees.
  Long shards go round piece after piece, so that what travels takes little beside what a device has.
* `Gather`: every device gets all keys and values: few bytes where K is much smaller than N.
* `Heads`: every device gets all tokens of N / P heads, and sends their outputs back.
* `Merge`: queries are the same on every device, which attends to its keys: a step of decoding, say.

What is O(T + S) numbers for all keys, tokens and arrays over keys alone, every device gets whole.

Source: Liu et al. 2023, arXiv:2310.01889 (ring); Jacobs et al. 2023, arXiv:2309.14509 (heads).
"""

import dataclasses
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from mha_jax.attention import softmax
from mha_jax.attention.biases import OfHeads
from mha_jax.attention.call import (
    Moves,
    Output,
    Problem,
    State,
    moving,
    of_keys,
    without_constants,
)
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens, extents
from mha_jax.backends.base import Backend
from mha_jax.backends.visits import array_module
from mha_jax.errors import UnsupportedError
from mha_jax.types import Array

# In how many pieces the keys of a device may go round, and how many keys these have at least.
PIECES, KEYS = (1, 2, 4), 2048


def _unchecked(run: Callable) -> Callable:
    """Let a pass be traced as in `jax.shard_map(check_vma=False)`: types do not say what varies in it."""

    @wraps(run)
    def method(self, *args):
        mesh = jax.sharding.get_abstract_mesh()
        inside = jax.shard_map(
            partial(run, self),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            axis_names=set(mesh.manual_axes),
            check_vma=False,
        )
        return inside(*args)

    return method


@dataclasses.dataclass(frozen=True)
class Shards(Backend):
    """Another backend on the shards of a sequence; to be called inside a `jax.shard_map`.

    Args:
      axis: The mesh axis, or axes, that cut the tokens.
      inner: What attends on a device; None chooses by the platform lowered for.

    Raises:
      UnsupportedError: If `axis` names no mesh axes.
    """

    bias_rules = True  # as what attends on a device

    axis: Any
    inner: Backend | None = None

    def __post_init__(self):
        axes = (self.axis,) if isinstance(self.axis, str) else self.axis
        name = type(self).__name__
        if not isinstance(axes, tuple) or not axes or not all(isinstance(x, str) for x in axes):
            raise UnsupportedError(
                f"{name}({self.axis!r}) names no mesh axis. Expected the name of the axis that cuts the "
                f'tokens, {name}("context"), or a tuple of names.'
            )
        object.__setattr__(self, "axis", axes)

    def why_not(self, problem: Problem, platform: str) -> str | None:
        try:
            parts = lax.axis_size(self.axis)
        except NameError:
            there = ", ".join(map(repr, jax.sharding.get_abstract_mesh().axis_names)) or "none"
            return (
                f"there is no mesh axis {', '.join(map(repr, self.axis))} to talk over here (axes: {there}). "
                "Call it inside a jax.shard_map over that axis, or pass "
                f"backend=mj.sharding.Sharded(sequence={self.axis!r})"
            )
        index = [x.index is None for x in (problem.q_tokens, problem.k_tokens)]
        if parts > 1 and index[0] != index[1]:
            sides = ("queries", "keys") if index[1] else ("keys", "queries")
            return (
                f"the tokens of the {sides[0]} bring rows, an index, and those of the {sides[1]} do not. "
                f"Pass both: a shard in the mesh's order is Tokens(length, index=i * length + "
                "jnp.arange(length)[None]), i the place of the device"
            )
        sides = problem.q.shape[1], problem.k.shape[1]
        cut = [
            a.shape for a in jax.tree.leaves((problem.mask, problem.bias)) if a.shape[2:] == sides
        ]
        if parts > 1 and cut:
            return (
                f"a mask array or bias {list(cut[0])} is over the queries and the keys of one shard, but "
                "queries see the keys of all shards. Write a rule on tokens, or let the library cut the "
                f"call: backend=mj.sharding.Sharded(sequence={self.axis!r}) outside jax.shard_map"
            )
        why = self.why_not_over(problem, parts)
        if why or self.inner is None:
            return why
        if problem.bias_rule is not None and not self.inner.bias_rules:
            return f"{type(self.inner).__name__} has no biases by rule; let inner be None"
        return self.inner.why_not(problem, platform)

    def placed(self, tokens: Tokens) -> Tokens:
        """Return the tokens of a shard with their rows in the whole, for what is beside attention."""
        try:
            place = lax.axis_index(self.axis).astype(jnp.int32)
        except NameError:  # refused in words by `why_not`
            return tokens
        return _placed(tokens, place)

    def why_not_over(self, problem: Problem, parts: int) -> str | None:
        """Say in words why a shard cannot be run with that many others, or return None."""
        return None

    @property
    def device(self) -> Backend:
        """What attends on a device."""
        return self.inner or Backend().differentiable()

    def differentiable(self) -> Backend:
        return dataclasses.replace(self, inner=self.device.differentiable())

    def partitionable(self) -> Backend | None:
        inner = self.device.partitionable()
        return None if inner is None else dataclasses.replace(self, inner=inner)


def why_not_in_parts(inner: Backend | None) -> str | None:
    """Say why a backend cannot see the keys of a row in parts, or return None."""
    if inner is None or inner.rests_on_state():
        return None
    return (
        f"{type(inner).__name__} differentiates whole rows, and here it would see them in parts. Take "
        'another backend, or strategy="gather"'
    )


# ---- what a device has --------------------------------------------------------------------------


def _placed(tokens: Tokens, place: Any) -> Tokens:
    """Return the tokens of a shard with their rows: those of the mesh's order if they bring none."""
    if tokens.index is not None:
        return tokens
    rows = jnp.arange(tokens.length, dtype=jnp.int32)[None]
    return dataclasses.replace(tokens, index=rows + (tokens.start + place * tokens.length))


class Shard:
    """A device's shard of a problem, with the tokens, and what masks and biases have, of all keys.

    The keys of all devices are parts: the shard of a device, or so many pieces of it.
    """

    def __init__(self, axis: tuple[str, ...], problem: Problem, pieces: int = 1):
        self.axis, self.parts, self.pieces = axis, lax.axis_size(axis), pieces
        self.place = lax.axis_index(axis).astype(jnp.int32)
        self.length, self.queries = problem.k.shape[1], problem.q_tokens
        self.size = self.length // pieces
        self.keys = self.of_all(problem.k_tokens)
        self.problem = dataclasses.replace(
            problem,
            q_tokens=_placed(problem.q_tokens, self.place),
            mask=jax.tree.map(self.over_all_keys, problem.mask),
            bias=jax.tree.map(self.over_all_keys, problem.bias),
        )
        plain = not jax.tree.leaves((problem.q_tokens, problem.k_tokens))
        queries = self.of_all(self.queries) if plain else self.problem.q_tokens
        self.seen = seen(problem.mask, queries, self.keys, self.queries.length, self.size)

    def of_all(self, tokens: Tokens) -> Tokens:
        """Return the tokens of the shards of all devices; plain ones stay plain."""
        joined = partial(self.joined, axis=1)
        return tokens.map(joined, self.parts * tokens.length, tokens.start)

    def joined(self, x: Any, axis: int) -> Array:
        """Return the shards of all devices side by side."""
        return lax.all_gather(jnp.asarray(x), self.axis, axis=axis, tiled=True)

    def over_all_keys(self, x: Array) -> Array:
        """Return an array [#B, #N, #T, #S] over all keys: one that is over queries, too, is so already."""
        return self.joined(x, 3) if x.shape[2:] == (1, self.length) else x

    def part(self, k: Array, v: Array, number: Any) -> Problem:
        """Return the problem of this device's queries and one part of the keys."""
        whole = dataclasses.replace(self.problem, k_tokens=self.keys)
        return of_keys(whole, k, v, number * self.size, self.size)

    def cut(self, x: Any, number: Any, axis: int = 3) -> Array:
        """Cut an array over all keys, one that has them, to a part."""
        if x.shape[axis] == 1:
            return x
        return lax.dynamic_slice_in_dim(x, number * self.size, self.size, axis)

    def put(self, whole: Array, part: Array, piece: Any) -> Array:
        """Write one piece of a gradient of this device's keys."""
        return lax.dynamic_update_slice_in_dim(whole, part, piece * self.size, 1)

    @property
    def turns(self) -> tuple[int, int]:
        """The first turn of a ring that some device needs, and how many there are to the last one."""
        some = self.seen.reshape(len(self.seen), self.parts, self.pieces).any(-1)
        return turns(some)

    def add(self, whole: Array, part: Array, number: Any) -> Array:
        """Add a part's gradient of a bias to that over all keys."""
        if whole.shape[3] == 1:
            return whole + part
        # Every part is visited once.
        return lax.dynamic_update_slice_in_dim(whole, part, number * self.size, 3)


def seen(mask: Mask, queries: Tokens, keys: Tokens, size: int, length: int) -> Any:
    """Say for shards of `size` queries and parts of `length` keys whether some query sees some key of a part.

    [shards, parts], in NumPy where the tokens are plain and the mask is a rule.
    """
    q = jax.tree.map(lambda x: x[:, None, :, None], extents(queries.facts(), size))
    k = jax.tree.map(lambda x: x[:, None, None, :], extents(keys.facts(), length))
    some = mask.reach(q, k).some
    counts = 1, 1, queries.length // size, keys.length // length
    shape = np.broadcast_shapes(np.shape(some), counts)
    return array_module(some).broadcast_to(some, shape).any((0, 1))


def turns(seen: Any) -> tuple[int, int]:
    """Return the first turn of a ring that some device needs, and how many there are to the last one.

    In turn t a device has the part that is t places before its own. Of all ways to go round, this leaves out
    the longest stretch of turns that nobody needs.

    >>> window = np.tri(4, dtype=bool) & ~np.tri(4, k=-2, dtype=bool)
    >>> turns(window), turns(window | window.T)
    ((0, 2), (3, 3))
    """
    parts = seen.shape[1]
    if not isinstance(seen, np.ndarray) or len(seen) < parts:
        return 0, parts
    needed = [t for t in range(parts) if any(seen[i, i - t] for i in range(parts))]
    if not needed:
        return 0, 0
    gaps = [(t - before) % parts or parts for before, t in zip([needed[-1], *needed], needed)]
    widest = gaps.index(max(gaps))
    return needed[widest], parts - gaps[widest] + 1


# ---- the ring -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ring(Shards):
    """Keys and values go round the devices of a mesh axis, which attend to one part after the other.

    Args:
      axis, inner: As `Gather`.
      pieces: In how many pieces, one after the other, a device's keys go round: what travels takes memory
        for two of them, and outputs are merged so often. None is up to 4, for long shards.

    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("context",))
    >>> shards = jax.P(None, "context")
    >>> def attend(x):
    ...     return mj.dot_product_attention(x, x, x, mask=mj.Causal(), backend=Ring("context"))
    >>> x = jnp.ones((2, 8, 4, 16))
    >>> jax.shard_map(attend, mesh=mesh, in_specs=shards, out_specs=shards)(x).shape
    (2, 8, 4, 16)
    """

    pieces: int | None = None

    def why_not_over(self, problem: Problem, parts: int) -> str | None:
        length = problem.k.shape[1]
        if self.pieces is not None and (self.pieces < 1 or length % self.pieces):
            return f"pieces={self.pieces} do not divide the {length} keys of a device"
        return why_not_in_parts(self.inner)

    def _shard(self, problem: Problem) -> Shard:
        length = problem.k.shape[1]
        fitting = (n for n in PIECES if n == 1 or (length % n == 0 and length >= n * KEYS))
        return Shard(self.axis, problem, self.pieces or max(fitting))

    @_unchecked
    def forward(self, problem: Problem) -> State:
        shard, dtype = self._shard(problem), problem.accumulator

        def step(keys, number, visit, running):
            def attend(running):
                k, v = keys
                state = self.device.forward(shard.part(k, v, number))
                m, l = _columns(state.m), _columns(state.l)
                return softmax.merge(running, softmax.Running(state.out.astype(dtype) * l, m, l))

            return visit(attend, _same, running)

        def piece(running, c):
            return self._around(shard, c, (problem.k, problem.v), running, step)

        start = softmax.start(problem.q.shape[:3], problem.v.shape[3], dtype)
        acc, m, l = _for_all(shard.pieces, piece, start)
        out = (acc * softmax.reciprocal(l)).astype(problem.v.dtype)
        m, l = (x[..., 0].swapaxes(1, 2) for x in (m, l))
        return State(out, m, l)

    @_unchecked
    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        shard, dtype = self._shard(problem), problem.accumulator
        first, count = shard.turns

        def step(keys, number, visit, sums):
            k, v = keys
            here = shard.part(k, v, number)
            travelled = self._rotated(sums[1:3], 1)  # they arrive while the product is taken
            stay = sums.q, sums.bias, sums.bias_rule

            def attend(stay):
                dq, bias, rule = stay
                own = self.device.cotangent(here, state, cotangent)
                own = _cast(without_constants(here, own), dtype)
                bias = None if bias is None else shard.add(bias, own.bias, number)
                return (dq + own.q, bias, jax.tree.map(jnp.add, rule, own.bias_rule)), own[1:3]

            stay, own = visit(attend, lambda stay: (stay, _zeros(keys, dtype)), stay)
            dk, dv = map(jnp.add, travelled, own)
            return Moves(stay[0], dk, dv, *stay[1:])

        def piece(whole, c):
            keys = problem.k, problem.v
            zeros = (jnp.zeros((x.shape[0], shard.size, *x.shape[2:]), dtype) for x in keys)
            start = whole._replace(**dict(zip("kv", zeros)))
            sums = self._around(shard, c, keys, start, step)
            home = self._rotated(_cast_like(sums[1:3], keys), 1 - first - count)
            dk, dv = (shard.put(x, part, c) for x, part in zip(whole[1:3], home))
            return sums._replace(k=dk, v=dv)

        asked = moving(problem)
        over = moving(shard.problem).bias
        start = _zeros(asked._replace(k=None, v=None, bias=over), dtype)
        start = start._replace(k=jnp.zeros_like(problem.k), v=jnp.zeros_like(problem.v))
        moves = _for_all(shard.pieces, piece, start)
        bias = moves.bias
        if bias is not None and bias.shape != asked.bias.shape:  # type: ignore[union-attr]
            bias = lax.psum_scatter(bias, self.axis, scatter_dimension=3, tiled=True)
        return _cast_like(moves._replace(bias=bias), asked)

    @_unchecked
    def tangent(self, problem: Problem, state: State, direction: Moves) -> Output:
        shard, dtype = self._shard(problem), problem.accumulator
        bias = jax.tree.map(shard.over_all_keys, direction.bias)

        def step(keys, number, visit, sums):
            k, v, dk, dv = keys

            def attend(sums):
                cut = jax.tree.map(partial(shard.cut, number=number), bias)
                moves = direction._replace(k=dk, v=dv, bias=cut)
                own = self.device.tangent(shard.part(k, v, number), state, moves)
                return jax.tree.map(jnp.add, sums, _cast(own, dtype))

            return visit(attend, _same, sums)

        def piece(sums, c):
            keys = problem.k, problem.v, direction.k, direction.v
            return self._around(shard, c, keys, sums, step)

        sums = _for_all(shard.pieces, piece, _zeros(Output(state.out, state.l), dtype))
        return _cast_like(sums, Output(problem.v, state.l))

    def _around(self, shard: Shard, c: Any, keys: Any, carry: Any, step: Callable) -> Any:
        """Take `step(keys, number of the part, visit, carry)` while piece c of every shard goes round.

        `visit(function, otherwise, x)` is `function(x)` where the part is seen, and `otherwise(x)` where not.
        """
        first, count = shard.turns
        everything = isinstance(shard.seen, np.ndarray) and shard.seen.all()
        own = jnp.asarray(shard.seen)[shard.place if len(shard.seen) > 1 else 0]

        def turn(carry, t):
            keys, carry = carry
            following = self._rotated(keys, 1)  # sent before the product is taken
            number = (shard.place - first - t) % shard.parts * shard.pieces + c

            def visit(function, otherwise, x):
                return function(x) if everything else lax.cond(own[number], function, otherwise, x)

            return (following, step(keys, number, visit, carry)), None

        piece = jax.tree.map(lambda x: shard.cut(x, c, 1), keys)
        start = self._rotated(piece, first), carry
        (_, carry), _ = lax.scan(turn, start, jnp.arange(count, dtype=jnp.int32))
        return carry

    def _rotated(self, x: Any, places: int) -> Any:
        """Send arrays on by some places around the ring."""
        parts = lax.axis_size(self.axis)
        if places % parts == 0:
            return x
        way = [(i, (i + places) % parts) for i in range(parts)]
        return jax.tree.map(lambda a: lax.ppermute(a, self.axis, way), x)


def _for_all(count: int, function: Callable, x: Any) -> Any:
    """Return x after `x = function(x, c)` for every c below `count`."""
    if count == 1:
        return function(x, 0)
    numbers = jnp.arange(count, dtype=jnp.int32)
    return lax.scan(lambda x, c: (function(x, c), None), x, numbers)[0]


def _same(x: Any) -> Any:
    return x


def _columns(x: Array) -> Array:
    """Turn [B, N, T] into [B, T, N, 1]."""
    return x.swapaxes(1, 2)[..., None]


def _zeros(x: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), x)


def _cast(x: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype), x)


def _cast_like(x: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), x, like)


# ---- whole rows on every device -------------------------------------------------------------------


class Whole(Shards):
    """Shards that travel, so that a device has whole rows; `there` and `back` say how."""

    def there(self, shard: Shard, x: Moves) -> Moves:
        """Send arrays of a problem, biases over all keys, to who attends: linear in them."""
        raise NotImplementedError

    def rows_there(self, shard: Shard, x: Any) -> Any:
        """Send arrays over queries and query heads, a State or an Output."""
        return x

    def rows_back(self, shard: Shard, x: Any) -> Any:
        """Send them back."""
        return x

    def problem_there(self, shard: Shard) -> Problem:
        arrays = dataclasses.replace(shard.problem, constants=())
        q, k, v, bias, _ = self.there(shard, moving(arrays))
        return dataclasses.replace(shard.problem, k_tokens=shard.keys, q=q, k=k, v=v, bias=bias)

    @_unchecked
    def forward(self, problem: Problem) -> State:
        shard = Shard(self.axis, problem)
        return self.rows_back(shard, self.device.forward(self.problem_there(shard)))

    @_unchecked
    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        shard, dtype = Shard(self.axis, problem), problem.accumulator
        whole, asked = self.problem_there(shard), moving(problem)
        rows = self.rows_there(shard, state), self.rows_there(shard, cotangent)
        moves = without_constants(whole, self.device.cotangent(whole, *rows))

        def there(x):
            over = jax.tree.map(shard.over_all_keys, x.bias)
            return self.there(shard, x._replace(bias=over))

        (moves,) = jax.linear_transpose(there, _zeros(asked, dtype))(_cast(moves, dtype))
        return _cast_like(moves, asked)

    @_unchecked
    def tangent(self, problem: Problem, state: State, direction: Moves) -> Output:
        shard = Shard(self.axis, problem)
        bias = jax.tree.map(shard.over_all_keys, direction.bias)
        moves = self.there(shard, direction._replace(bias=bias))
        rows = self.rows_there(shard, state)
        return self.rows_back(shard, self.device.tangent(self.problem_there(shard), rows, moves))


@dataclasses.dataclass(frozen=True)
class Gather(Whole):
    """Every device of a mesh axis gets all keys and values.

    Args:
      axis: The mesh axis, or axes, over which a `jax.shard_map` has cut queries, keys and values.
      inner: What attends on a device; None chooses by the platform lowered for.

    Raises:
      UnsupportedError: If `axis` names no mesh axes.
    """

    def there(self, shard: Shard, x: Moves) -> Moves:
        return x._replace(**{name: _map(shard.joined, getattr(x, name), 1) for name in "kv"})


@dataclasses.dataclass(frozen=True)
class Heads(Whole):
    """Every device of a mesh axis gets all tokens of some heads. Args: as `Gather`."""

    def why_not_over(self, problem: Problem, parts: int) -> str | None:
        count = problem.k.shape[2]
        if count % parts == 0:
            return None
        return (
            f"{count} key-value heads cannot be given to {parts} devices evenly. "
            'Take strategy="ring" or "gather"'
        )

    def there(self, shard: Shard, x: Moves) -> Moves:
        q, k, v = (_map(self._turned, a, 2, 1) for a in x[:3])
        rule = _map(OfHeads, x.bias_rule, None)
        return Moves(q, k, v, _map(self._array, x.bias, shard), rule)

    def rows_there(self, shard: Shard, x: Any) -> Any:
        out, *statistics = x
        return type(x)(self._turned(out, 2, 1), *(self._turned(a, 1, 2) for a in statistics))

    def rows_back(self, shard: Shard, x: Any) -> Any:
        out, *statistics = x
        return type(x)(self._turned(out, 1, 2), *(self._turned(a, 2, 1) for a in statistics))

    def problem_there(self, shard: Shard) -> Problem:
        problem = super().problem_there(shard)
        dropout, rule, count = problem.dropout, problem.bias_rule, problem.q.shape[2]
        first = shard.place * count
        if dropout is not None:
            dropout = dataclasses.replace(dropout, head_start=dropout.head_start + first)
        return dataclasses.replace(
            problem,
            q_tokens=shard.of_all(shard.queries),
            dropout=dropout,
            mask=jax.tree.map(partial(self._array, shard=shard), problem.mask),
            bias_rule=_map(OfHeads, rule, first + jnp.arange(count, dtype=jnp.int32)),
        )

    def _turned(self, x: Array, split: int, joined: int) -> Array:
        return lax.all_to_all(x, self.axis, split, joined, tiled=True)

    def _array(self, x: Array, shard: Shard) -> Array:
        """Give every device all queries of its heads of an array [#B, #N, #T, S]."""
        cut = x.shape[2] == shard.problem.q.shape[1]
        if x.shape[1] == 1:
            return shard.joined(x, 2) if cut else x
        if cut:
            return self._turned(x, 1, 2)
        n = x.shape[1] // shard.parts
        return lax.dynamic_slice_in_dim(x, shard.place * n, n, 1)


def _map(function: Callable, x: Any, *args: Any) -> Any:
    """Apply a function to what may not be there."""
    return None if x is None else function(x, *args)


# ---- queries everywhere ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Merge(Shards):
    """Queries that every device has attend to its keys; outputs are merged. Args: as `Gather`."""

    def why_not_over(self, problem: Problem, parts: int) -> str | None:
        return why_not_in_parts(self.inner)

    @_unchecked
    def forward(self, problem: Problem) -> State:
        out, m, l = self.device.forward(self._own(problem))
        largest = lax.pmax(m, self.axis)
        l = l * jnp.exp(m - softmax.finite(largest))
        whole = lax.psum(l, self.axis)
        share = _columns(l * softmax.reciprocal(whole))
        merged = lax.psum(out.astype(problem.accumulator) * share, self.axis)
        return State(merged.astype(problem.v.dtype), largest, whole)

    @_unchecked
    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        moves = self.device.cotangent(self._own(problem), state, cotangent)
        dq = lax.psum(_cast(moves.q, problem.accumulator), self.axis)
        return moves._replace(q=_cast(dq, problem.q.dtype))

    @_unchecked
    def tangent(self, problem: Problem, state: State, direction: Moves) -> Output:
        own = self.device.tangent(self._own(problem), state, direction)
        sums = lax.psum(_cast(own, problem.accumulator), self.axis)
        return _cast_like(sums, own)

    def _own(self, problem: Problem) -> Problem:
        place = lax.axis_index(self.axis).astype(jnp.int32)
        return dataclasses.replace(problem, k_tokens=_placed(problem.k_tokens, place))
