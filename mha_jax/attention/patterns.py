"""Masks of further patterns of positions: chunks, gaps, and prefixes that all queries see."""

from typing import Any

import numpy as np

from mha_jax.attention.given import integer
from mha_jax.attention.masks import Causal, Mask, Reach, pytree, static
from mha_jax.types import ArrayLike, Int

_MOST = int(np.iinfo(np.int32).max)


def _word(steps: Any) -> Any:
    """Return how many steps there are from a position to a later one, which 31 bits may not hold."""
    return steps.astype(np.uint32)


@pytree
class ChunkedCausal(Mask):
    """A query sees the keys of its own chunk of `size` positions, at its own position and before.

    Chunks begin at the positions that are multiples of `size`: Llama 4's local layers.

    >>> ChunkedCausal(2).matrix(mj.Tokens(4), mj.Tokens(4)).astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    size: int = static()

    def __post_init__(self):
        hint = "It counts the positions of a chunk, 8192 for Llama 4; one without end is Causal()."
        size = integer("size of ChunkedCausal", self.size, 1, _MOST, hint)
        object.__setattr__(self, "size", size)

    @property
    def behind(self):
        return self.size - 1

    def visible(self, q, k):
        return (q.positions >= k.positions) & (self._start(q.positions) == self._start(k.positions))

    def reach(self, q, k):
        # By the numbers of chunks: the first position of one may lie below the lowest that there is.
        (q_low, q_high), (k_low, k_high) = (
            tuple(end // self.size for end in side.positions) for side in (q, k)
        )
        same = Reach(
            (q_low <= k_high) & (k_low <= q_high),
            (q_low == q_high) & (k_low == k_high) & (q_low == k_low),
        )
        return Causal().reach(q, k) & same

    def _start(self, positions: Any) -> Any:
        """Return the first position of a chunk."""
        return positions - positions % self.size


@pytree
class Dilated(Mask):
    """A query sees the keys whose distance from it is a multiple of `step`, on both sides.

    `Causal() & Window(4 * 7, 0) & Dilated(7)` sees five keys of the past, every seventh.
    """

    step: int = static()

    def __post_init__(self):
        hint = "It counts positions from one key to the next; 1 sees every key."
        step = integer("step of Dilated", self.step, 1, _MOST, hint)
        object.__setattr__(self, "step", step)

    def visible(self, q, k):
        # No difference of a query's and a key's position is taken: it may leave 32 bits.
        return q.positions % self.step == k.positions % self.step

    def reach(self, q, k):
        (q_low, q_high), (k_low, k_high) = q.positions, k.positions
        # How far the least distance, of the first key from the last query, is from one that is seen.
        missing = _word((q_high % self.step - k_low % self.step) % self.step)
        queries, keys = _word(q_high - q_low), _word(k_high - k_low)
        some = (missing <= queries) | (missing - queries <= keys)
        one_pair = (q_low == q_high) & (k_low == k_high)
        return Reach(some, (self.step == 1) | (one_pair & (missing == 0)))


@pytree
class PrefixLM(Mask):
    """Every query sees the first `lengths` positions, and of the others those at its own and before.

    Args:
      lengths: Of the prefixes: an integer, or integers of the batch axes [*#B].

    >>> PrefixLM(2).matrix(mj.Tokens(3), mj.Tokens(3)).astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    holds_numbers = True

    lengths: Int[ArrayLike, "..."] | int

    def visible(self, q, k):
        return (q.positions >= k.positions) | (k.positions < self._each())

    def reach(self, q, k):
        k_low, k_high = k.positions
        lengths = self._each()
        return Causal().reach(q, k) | Reach(k_low < lengths, k_high < lengths)

    def _each(self) -> Any:
        """Return the lengths as they broadcast against the facts; `check` has laid them so for backends."""
        return (
            np.reshape(self.lengths, (-1, 1, 1, 1)) if np.ndim(self.lengths) == 1 else self.lengths
        )
