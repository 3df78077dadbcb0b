"""Scalings of rotary positions: how pairs turn in texts longer than those of the training."""

import dataclasses
import math
from typing import Any

import numpy as np

from mha_jax.attention.given import is_number, switch
from mha_jax.errors import ShapeError
from mha_jax.types import Float


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How frequencies are changed for texts longer than those of the training.

    To add one: subclass it, write `frequencies`; `magnitude` multiplies the turned features.
    """

    @property
    def magnitude(self) -> float:
        """The factor on turned features, so that logits take its square."""
        return 1.0

    def frequencies(self, base: float, size: int) -> Float[np.ndarray, "pairs"]:
        """Return the angle of every pair at position 1, in float64.

        Args:
          base: As of `Rotary`.
          size: Features that turn, two for each pair.
        """
        return plain_frequencies(base, size)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            if field.type is bool:
                switch(f"{field.name} of {type(self).__name__}", x)
                continue
            if x is None and field.default is None:
                continue
            if not is_number(x) or not 0 < x <= 1e15:
                raise ShapeError(
                    f"{field.name} of {type(self).__name__} must be a positive number: got {x!r}. "
                    f"{type(self).__name__}({', '.join(f.name for f in dataclasses.fields(self))})."
                )
        keep_plain(self)


def keep_plain(one: Any) -> None:
    """Keep NumPy's numbers in the fields of a frozen dataclass as Python's, which JSON can hold."""
    for field in dataclasses.fields(one):
        if isinstance(x := getattr(one, field.name), np.generic):
            object.__setattr__(one, field.name, x.item())


def plain_frequencies(base: float, size: int) -> Float[np.ndarray, "pairs"]:
    """Return base ** (-2 i / size) for every pair i."""
    return float(base) ** (-np.arange(0, size, 2, dtype=np.float64) / max(size, 1))


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """Positions divided by `factor`.

    Source: Chen et al. 2023, arXiv:2306.15595, eq. 4.
    """

    factor: float

    def frequencies(self, base, size):
        return plain_frequencies(base, size) / self.factor


@dataclasses.dataclass(frozen=True)
class NTK(Scaling):
    """A larger base, by which the slowest pair turns `factor` times more slowly and the fastest as before.

    Source: Peng et al. 2023, arXiv:2309.00071, definition 1.
    """

    factor: float

    def frequencies(self, base, size):
        return plain_frequencies(self.base(base, size), size)

    def base(self, base: float, size: int) -> float:
        """Return the larger base."""
        return base * self.factor ** (size / (size - 2)) if size > 2 else base


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Pairs that turn rarely within the trained length turn `factor` times more slowly, others as before.

    Args:
      factor: How much longer texts may be.
      low, high: Turns within `original_length` below which a pair is slowed down, and above which it is not;
        in between by degrees.
      original_length: Tokens of the texts trained on.

    Source: Llama team 2024, github.com/meta-llama/llama-models, `apply_scaling`.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def frequencies(self, base, size):
        plain = plain_frequencies(base, size)
        turns = self.original_length * plain / (2 * np.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)

    def __post_init__(self):
        super().__post_init__()
        if self.low >= self.high:
            raise ShapeError(
                f"low of Llama3 must be below high: got low={self.low}, high={self.high}. They are turns "
                "within the original length, 1 and 4 in Llama 3.1."
            )


@dataclasses.dataclass(frozen=True)
class YaRN(Scaling):
    """Pairs that turn rarely are slowed down `factor` times, by degrees; logits grow a little.

    Args:
      factor: How much longer texts may be.
      original_length: Tokens of the texts trained on.
      fast, slow: Turns within `original_length` above which a pair is left as it is, and below which it is
        slowed down wholly.
      attention: The factor on turned features; 1 + 0.1 log(factor) if None.
      truncate: Round the ends of the ramp to whole pairs.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    truncate: bool = True

    @property
    def magnitude(self):
        if self.attention is not None:
            return float(self.attention)
        return yarn_magnitude(self.factor, 1.0)

    def frequencies(self, base, size):
        plain = plain_frequencies(base, size)

        def pair(turns: float) -> float:
            return (
                size * math.log(self.original_length / (turns * 2 * np.pi)) / (2 * math.log(base))
            )

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp


def yarn_magnitude(factor: float, weight: float) -> float:
    """Return 1 + 0.1 weight log(factor), 1 for texts that are not longer.

    Raises:
      ShapeError: If the weight is no positive number.
    """
    if not is_number(weight) or not 0 < weight <= 1e15:
        raise ShapeError(
            f"mscale and mscale_all_dim of rotary positions must be positive numbers: got {weight!r}. Pass "
            "the model's config.json as it is."
        )
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
