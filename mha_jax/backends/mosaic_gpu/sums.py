"""What a bias's cotangent sums up: which tiles of logits read the same numbers of it.

Every tile of the cotangent is a line of tiles of logits, which one program goes over and writes once: the
order of the sums is fixed. A bias as an array is shared along its axes of 1; one that knows distances alone,
by the tiles on a diagonal.

B batch   T query length   S key length   N query heads
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mha_jax.attention.call import Problem
from mha_jax.backends import visits
from mha_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Summed:
    """The lines of a cotangent.

    Args:
      problem: Its examples and its heads, [B, N].
      kind: Those for which tiles are judged each, [#B, #N].
      kept: Whether the cotangent has examples, and heads, of its own.
      grid: Tiles of rows and columns of the logits.
      shape: Those of the cotangent, for an example and a head.
      members: Tiles of the logits of every line, [lines, most]; -1 where it has no more.
    """

    problem: tuple[int, int]
    kind: tuple[int, int]
    kept: tuple[bool, bool]
    grid: tuple[int, int]
    shape: tuple[int, int]
    members: np.ndarray = dataclasses.field(compare=False)

    @property
    def outer(self) -> tuple[int, int]:
        """Examples and heads of the cotangent."""
        b, n = (size if keep else 1 for size, keep in zip(self.problem, self.kept))
        return b, n

    @property
    def tiles(self) -> int:
        """Tiles of the logits of a head."""
        return self.grid[0] * self.grid[1]

    @property
    def across(self) -> int:
        """Tiles of the logits of a row of tiles."""
        return self.grid[1]

    @property
    def _listed(self) -> tuple[int, int]:
        """Examples and heads that are summed up and have entries of their own."""
        b, n = (1 if keep else size for size, keep in zip(self.kind, self.kept))
        return b, n

    @property
    def listed_heads(self) -> int:
        """Heads among the entries of a line."""
        return self._listed[1]

    @property
    def again_heads(self) -> int:
        """Heads for which an entry stands."""
        return 1 if self.kept[1] else self.problem[1] // self.kind[1]

    @property
    def again(self) -> int:
        """How many tiles an entry stands for, those of examples and heads that are judged as one."""
        return self.again_heads * (1 if self.kept[0] else self.problem[0] // self.kind[0])

    @property
    def numbers(self) -> np.ndarray:
        """What the entries of every line are called: (example * heads + head) * tiles + tile."""
        b, n = self._listed
        first = np.arange(b * n, dtype=np.int32)[None, :, None] * np.int32(self.tiles)
        return (first + self.members[:, None]).reshape(len(self.members), -1)

    def lines(self, kind: Any) -> Any:
        """Return how tiles [#B, #N, blocks of T, blocks of S] are seen, line by line."""
        (b, n), (listed_b, listed_n) = self.kind, self._listed
        xp = visits.array_module(kind)
        kind = kind.reshape(b, n, self.tiles)[:, :, self.members]
        kind = xp.where(self.members[None, None] < 0, visits.EMPTY, kind)
        kind = kind.reshape(b // listed_b, listed_b, n // listed_n, listed_n, *self.members.shape)
        kind = xp.transpose(kind, (0, 2, 4, 1, 3, 5))
        return kind.reshape(b // listed_b, n // listed_n, len(self.members), -1)


def of_array(problem: Problem, shape: tuple[int, ...], rows: int, columns: int) -> Summed:
    """Return what a bias [#B, #N, #T, #S] sums up, by tiles of so many rows and columns."""
    grid = _grid(problem, rows, columns)
    own_rows, own_columns = (
        size if kept > 1 else 1 for size, kept in zip(grid, shape[2:], strict=True)
    )
    tiles = np.arange(grid[0] * grid[1], dtype=np.int32).reshape(
        own_rows, grid[0] // own_rows, own_columns, grid[1] // own_columns
    )
    members = tiles.transpose(0, 2, 1, 3).reshape(own_rows * own_columns, -1)
    kept = shape[0] > 1, shape[1] > 1
    return _summed(problem, rows, columns, kept, (own_rows, own_columns), members)


def of_distances(problem: Problem, rows: int, columns: int) -> Summed:
    """Return what the diagonals sum up, that of the last row and the first column first, head by head."""
    down, across = _grid(problem, rows, columns)
    steps = rows // columns
    row = np.arange(down, dtype=np.int32)
    column = np.arange(steps * (down - 1) + across, dtype=np.int32)[:, None]
    column = column - np.int32(steps) * (down - 1 - row)
    inside = (column >= 0) & (column < across)
    members = np.where(inside, row * np.int32(across) + column, np.int32(-1))
    return _summed(problem, rows, columns, (False, True), (1, len(members)), members)


def shared(tiles: Array, bias: Any) -> Array:
    """Sum up [#B, #N, rows, columns] along the axes of 1 of a bias; the others end with their tokens."""
    t, s = bias.shape[2:]
    tiles = tiles[:, :, :t] if t > 1 else tiles.sum(2, keepdims=True)
    tiles = tiles[..., :s] if s > 1 else tiles.sum(3, keepdims=True)
    return tiles.astype(bias.dtype)


def along(tiles: Array, rows: int, before: int, count: int) -> Array:
    """Sum up the diagonals of [..., R, C] rows and columns: `count` of them, from `before` rows below.

    Args:
      tiles: As `rules.laid` lays numbers.
      rows: Of the logits, in whole tiles.
      before: Tokens of them.
      count: Diagonals that tokens have.

    >>> along(jnp.array([[1, 2, 4], [8, 16, 32]]), rows=2, before=2, count=4).tolist()
    [8, 17, 34, 4]
    """
    *lead, height, width = tiles.shape
    # Rows of `wide` numbers, read in rows of one less, move by one from row to row.
    wide = height + width
    tiles = jnp.pad(tiles[..., ::-1, :], [(0, 0)] * (len(lead) + 1) + [(0, height)])
    moved = tiles.reshape(*lead, height * wide)[..., : height * (wide - 1)]
    sums = moved.reshape(*lead, height, wide - 1).sum(-2)
    return sums[..., rows - before : rows - before + count]


def _grid(problem: Problem, rows: int, columns: int) -> tuple[int, int]:
    return -(-problem.q.shape[1] // rows), -(-problem.k.shape[1] // columns)


def _summed(problem: Problem, rows: int, columns: int, kept, shape, members) -> Summed:
    b, _, n, _ = problem.q.shape
    kind = visits.kinds(problem, rows, columns).shape[:2]
    return Summed((b, n), kind, kept, _grid(problem, rows, columns), shape, members)
