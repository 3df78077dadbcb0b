"""Dropout whose bits are a pure function of (key, batch, head, query row, key row).

Stream, version 1 (part of the contract: changing it changes users' numbers). A Threefry-2x32 key
for every (batch, head, query row), O(T) of them,

    pair(b, n)   = threefry2x32(key words, counter (b, n))
    (a, c)(t)    = threefry2x32(pair(b, n), counter (t, 1))

and for every weight a 32-bit mix of that pair and the key row s, nine integer operations:

    x = a + s * 0x9E3779B9
    x = (x ^ x >> 16) * 0x7FEB352D + c
    x = (x ^ x >> 15) * 0x846CA68B
    keep  if  x >= rate * 2**32

b, n, t and s are places in the whole, unsharded, unpadded arrays, so tile sizes, shards and padding
cannot change a bit, and the same source runs in XLA, Mosaic, Triton and the interpreters. Dropout
acts after the softmax: the denominator keeps every weight, kept weights are divided by `1 - rate`.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Threefry); the
multipliers and shifts are those of the `lowbias32` mixer (C. Wellons, 2018).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.brief import alike, brief, short
from mha_jax.attention.given import dtype_of, is_number, random_key
from mha_jax.errors import ShapeError
from mha_jax.types import Array, ArrayLike, Int, PRNGKey, Size, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_GOLDEN = np.uint32(0x9E3779B9)
_MIX_1 = np.uint32(0x7FEB352D)
_MIX_2 = np.uint32(0x846CA68B)
_VERSION = np.uint32(1)


def threefry2x32(key: tuple, counter: tuple) -> tuple:
    """Apply Threefry-2x32 with 20 rounds to uint32 values that broadcast.

    >>> [hex(int(word)) for word in threefry2x32((np.uint32(0),) * 2, (jnp.uint32(0), jnp.uint32(0)))]
    ['0x6b200159', '0x99ba4efe']
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(distance) | y >> np.uint32(32 - distance)) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def mix(a: ArrayLike, c: ArrayLike, column: ArrayLike) -> ArrayLike:
    """Hash a row's key pair and a key row, all uint32 that broadcast, to 32 bits."""
    x = a + column * _GOLDEN
    x = (x ^ x >> np.uint32(16)) * _MIX_1 + c
    return (x ^ x >> np.uint32(15)) * _MIX_2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout on the attention weights.

    Args:
      key: A JAX key (`jax.random.key`), or its words as uint32.
      rate: Share of the weights to drop, a Python number in [0, 1).
      batch_start: Place of the first example in the whole batch, when this is a shard of it.
      head_start: Place of the first query head among all, when this is a shard of them.

    Raises:
      ShapeError: If `rate` is outside [0, 1).

    >>> dropout = Dropout(jax.random.key(0), 0.5)
    >>> whole = dropout.keep(1, 1, np.arange(4)[None], np.arange(6)[None])
    >>> tile = dropout.keep(1, 1, np.arange(2, 4)[None], np.arange(3, 6)[None])
    >>> bool((whole[..., 2:, 3:] == tile).all())
    True
    """

    key: PRNGKey
    rate: float = dataclasses.field(metadata={"static": True})
    batch_start: Int[ArrayLike, ""] | int = 0
    head_start: Int[ArrayLike, ""] | int = 0

    def __repr__(self) -> str:
        return brief(self)

    __eq__ = alike

    def __post_init__(self):
        if not is_number(self.rate) or not 0 <= self.rate < 1:
            raise ShapeError(
                f"the dropout rate must be a number in [0, 1): got {short(self.rate)}. "
                "It is the share of attention weights to drop, Dropout(key, rate) in this order; pass "
                "dropout=None for none."
            )

    @property
    def threshold(self) -> np.uint32:
        """The smallest 32-bit hash that is kept."""
        return np.uint32(min(round(float(self.rate) * 2**32), 2**32 - 1))

    @property
    def factor(self) -> float:
        """What a kept weight is multiplied by: 1 / (1 - rate)."""
        return 1 / (1 - float(self.rate))

    def key_data(self) -> UInt32[Array, "2"]:
        """Return the key as two words; longer keys (rbg) are hashed down to two.

        Raises:
          ShapeError: If `key` is not one key.
        """
        words = jnp.asarray(random_key("the key of a Dropout", self.key))
        if words.shape == (2,):
            return words
        return jnp.stack(threefry2x32((words[0], words[1]), (words[2], words[3])))

    def of_data(self) -> "Dropout":
        """Return the same dropout with its key as data, which any transformation can follow.

        Raises:
          ShapeError: If `key` is not one key, or a start not one integer.
        """
        for name in ("batch_start", "head_start"):
            start = getattr(self, name)
            kind = np.dtype(int) if type(start) is int else dtype_of(start)
            whole = kind is not None and jnp.issubdtype(kind, jnp.integer)
            fits = type(start) is not int or -(2**31) <= start < 2**31
            if not whole or not fits or jnp.shape(start) != ():
                raise ShapeError(
                    f"{name} of a Dropout must be one integer of 32 bits: got {start!r}. It is the place of "
                    "this shard's first example, or head, in the whole."
                )
        return dataclasses.replace(self, key=self.key_data())

    def row_keys(
        self, batch: Size, heads: int, rows: Int[ArrayLike, "#B T"]
    ) -> tuple[UInt32[Array, "B N T"], UInt32[Array, "B N T"]]:
        """Return the pair of words of every row; the hash of its weights starts from them."""
        words = self.key_data()
        b = (jnp.arange(batch, dtype=jnp.uint32) + _word(self.batch_start))[:, None]
        n = (jnp.arange(heads, dtype=jnp.uint32) + _word(self.head_start))[None, :]
        pair = threefry2x32((words[0], words[1]), tuple(jnp.broadcast_arrays(b, n)))
        pair = (pair[0][..., None], pair[1][..., None])
        t = jnp.broadcast_to(_word(rows)[:, None, :], (batch, heads, rows.shape[1]))
        return threefry2x32(pair, (t, jnp.full_like(t, _VERSION)))

    def keep(
        self, batch: Size, heads: int, rows: Int[ArrayLike, "#B T"], columns: Int[ArrayLike, "#B S"]
    ) -> Array:
        """Return the keep bits of whole rows, [B, N, T, S]: for tests and plain definitions."""
        a, c = self.row_keys(batch, heads, rows)
        return self.kept(a[..., None], c[..., None], columns[:, None, None, :])

    def kept(self, a: ArrayLike, c: ArrayLike, columns: ArrayLike) -> Array:
        """Return the keep bits for row keys and key rows that broadcast against each other."""
        return jnp.asarray(mix(a, c, _word(columns)) >= self.threshold)


def _word(x: ArrayLike | int) -> Array:
    """Return integers as 32-bit words, negative ones modulo 2**32."""
    return jnp.asarray(x, jnp.int32).astype(jnp.uint32)
