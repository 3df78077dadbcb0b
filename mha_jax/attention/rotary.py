"""Rotary positions: projected queries and keys turned by angles that grow with their positions.

B batch   L tokens of one side   N heads   H head size   R = fraction H features that turn   A axes

Feature i of the first half of R and feature i of the second are the two coordinates of a pair, or,
interleaved, features 2 i and 2 i + 1. A token at position p turns its pair i by p times the frequency of i,
so that q . k knows the distance of two tokens alone. Positions are those of the tokens: they restart in
packed sequences, and a cache keeps its keys turned.

Source: Su et al. 2021, arXiv:2104.09864, section 3.4; for images, each axis turns its own share of the pairs.

>>> rotary = Rotary(base=500000.0, scaling=Llama3(8.0, original_length=8192))
>>> rotary(jnp.ones((2, 5, 3, 8)), jnp.arange(5)).shape
(2, 5, 3, 8)
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.given import as_array, integer, is_integer, is_number, of_kind, switch
from mha_jax.attention.rotary_scaling import (
    NTK,
    Linear,
    Llama3,
    Scaling,
    YaRN,
    keep_plain,
    yarn_magnitude,
)
from mha_jax.errors import ArgumentError, ShapeError
from mha_jax.types import Array, ArrayLike, Float, Int

__all__ = ["NTK", "Linear", "Llama3", "Rotary", "Scaling", "YaRN"]

# A scaling's fields by their names in a config.
_LLAMA3 = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
_YARN = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "fast": "beta_fast",
    "slow": "beta_slow",
    "attention": "attention_factor",
    "truncate": "truncate",
}
_CONFIGS = {
    "linear": (Linear, {"factor": "factor"}),
    "llama3": (Llama3, _LLAMA3),
    "yarn": (YaRN, _YARN),
}


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Scaling | None:
    """Return the scaling that a config's dictionary describes."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" and "mrope_section" not in rope:
        return None
    if kind not in tuple(_CONFIGS):
        raise ShapeError(
            f"rotary positions of type {kind!r} are none of {sorted(_CONFIGS)}: got {dict(rope)}. Types that "
            "look at the length of the text ('dynamic', 'longrope') would turn the keys in a cache anew with "
            "every token; write a Scaling of one's own for a fixed length."
        )
    scaling, names = _CONFIGS[kind]
    given = {field: rope[name] for field, name in names.items() if rope.get(name) is not None}
    longest = config.get("max_position_embeddings")
    if "original_length" in names:
        original = given.setdefault("original_length", longest)
        if "factor" not in given and is_number(longest) and is_number(original) and original:
            given["factor"] = longest / original
    if "factor" not in given:
        raise ShapeError(f"rotary positions of type {kind!r} need a factor: got {dict(rope)}.")
    made, each, every = scaling(**given), rope.get("mscale"), rope.get("mscale_all_dim")
    if isinstance(made, YaRN) and made.attention is None and each and every:
        attention = yarn_magnitude(made.factor, each) / yarn_magnitude(made.factor, every)
        made = dataclasses.replace(made, attention=attention)
    return made


def _fraction(config: Mapping[str, Any]) -> Any:
    """Return the share of a head that turns: of a config with a head size, whole features."""
    fraction = config.get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
    names = ("head_dim", "hidden_size", "num_attention_heads")
    size, width, heads = (config[x] if is_integer(config.get(x)) else 0 for x in names)
    size = size or width // (heads or 1)
    if not is_number(fraction) or not 0 < fraction < 1 or size < 1:
        return float(fraction) if is_number(fraction) else fraction
    return int(size * fraction) / size


def _said(scaling: Scaling) -> dict[str, Any]:
    """Return a scaling as a config's dictionary."""
    for kind, (known, names) in _CONFIGS.items():
        if type(scaling) is known:
            fields = {name: getattr(scaling, field) for field, name in names.items()}
            return {"rope_type": kind} | {k: v for k, v in fields.items() if v is not None}
    raise ShapeError(
        f"a Hugging Face config has no name for {type(scaling).__name__}: expected one of {sorted(_CONFIGS)}."
    )


_UNSAID = "the head size is not said: it is that of what is turned, key_dim of the layer"
# What others call what is said otherwise here.
_ELSEWHERE = {
    **dict.fromkeys(("dim", "head_dim", "head_size", "key_dim", "embed_dim"), _UNSAID),
    **dict.fromkeys(("theta", "rope_theta", "max_wavelength"), "pass base="),
    **dict.fromkeys(("rotary_pct", "partial_rotary_factor"), "pass fraction="),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), "positions have no largest one"),
    "scaling_factor": "pass scaling=mj.rotary.Linear(factor)",
}
_Class = TypeVar("_Class", bound=type)
# Below, a whole number is rather somebody's head size than a base.
_LEAST_WHOLE_BASE = 1000


def _tells_names(cls: _Class) -> _Class:
    """Let a dataclass tell in words what it calls its arguments."""
    made, known = cls.__init__, [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(made)
    def __init__(self: Any, *values: Any, **fields: Any) -> None:
        for name in fields.keys() - known:
            hint = f" Here {_ELSEWHERE[name]}." if name in _ELSEWHERE else ""
            raise ArgumentError(
                f"{cls.__name__} takes {', '.join(known)}: got {name}={fields[name]!r}.{hint} "
                f"{cls.__name__}(base=10000.0) is the usual one."
            )
        made(self, *values, **fields)

    cls.__init__ = __init__
    return cls


@_tells_names
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions, as a rule: for the layer, `rotary=Rotary()`, or by itself, `rotary(x, positions)`.

    The head size is not said: it is that of what is turned.

    Args:
      base: Of the frequencies: the slowest pair turns once in about 2 pi base tokens.
      fraction: The share of the head size that turns, from the front; the rest stays.
      interleaved: Pairs are neighbours (GPT-J, Meta's Llama) instead of halves (GPT-NeoX, Hugging Face).
      scaling: For longer texts: `mj.rotary.Linear`, `NTK`, `Llama3`, `YaRN`; none if None.
      axes: The lengths of several attention axes that are folded into one, row by row, `(14, 14)` for an
        image of patches: each turns its own share of the pairs. One axis if None.

    Raises:
      ShapeError: If an argument is out of its range.
      ArgumentError: If there is no argument of a name.

    >>> x = jnp.ones((1, 6, 1, 8))
    >>> image = Rotary(axes=(2, 3))(x, jnp.arange(6))
    >>> bool((image[0, 0] == x[0, 0]).all())  # at the origin nothing turns
    True
    """

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: Scaling | None = None
    axes: tuple[int, ...] | None = None

    def __post_init__(self):
        if not is_number(self.base) or not 1 < self.base <= 1e30:
            raise ShapeError(
                f"base of Rotary must be a number above 1: got {self.base!r}. Expected 10000.0, say; Llama 3 "
                "has 500000.0."
            )
        if isinstance(self.base, numbers.Integral) and self.base < _LEAST_WHOLE_BASE:
            raise ShapeError(
                f"base of Rotary is {self.base!r}, which looks like a head size; {_UNSAID}. Expected "
                f"10000.0, say; if it is the base that you mean, pass base={float(self.base)!r}."
            )
        if not is_number(self.fraction) or not 0 < self.fraction <= 1:
            raise ShapeError(
                f"fraction of Rotary is the share of the head size that turns: got {self.fraction!r}. "
                "Expected a number above 0 and at most 1; for no rotation pass rotary=None."
            )
        switch("interleaved of Rotary", self.interleaved)
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            raise ShapeError(
                f"scaling of Rotary must be a Scaling or None: got {self.scaling!r}. Pass "
                "mj.rotary.Linear(2.0), NTK(2.0), Llama3(8.0) or YaRN(4.0, 4096); of a Hugging Face config, "
                "Rotary.from_config(config)."
            )
        if self.axes is not None:
            axes = tuple(self.axes) if isinstance(self.axes, (tuple, list)) else ()
            if not axes or not all(isinstance(n, numbers.Integral) and n > 0 for n in axes):
                raise ShapeError(
                    f"axes of Rotary are the lengths of the attention axes: got {self.axes!r}. Expected "
                    "positive integers, (14, 14) for an image of 14 x 14 patches, or None for a sequence."
                )
            object.__setattr__(self, "axes", tuple(map(int, axes)))
        keep_plain(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Rotary":
        """Return the rotary positions of a Hugging Face config, as a dictionary.

        It reads `rope_theta`, `partial_rotary_factor`, `rope_scaling` or `rope_parameters`, and GPT-NeoX's
        `rotary_pct` and `rotary_emb_base`. Pairs are halves, as in its models of the Llama family.

        Raises:
          ShapeError: If the config has a scaling that is no function of positions alone, or an unknown one.

        >>> Rotary.from_config({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
        Rotary(base=500000.0, fraction=1.0, interleaved=False, scaling=Linear(factor=2.0), axes=None)
        """
        of_kind("config", config, Mapping, "Pass config.to_dict() of Hugging Face.")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope = dict(
            of_kind("the config's rope_scaling", rope, Mapping, "Pass its config.json as it is.")
        )
        if any(isinstance(x, Mapping) for x in rope.values()):
            raise ShapeError(
                f"the config has rotary positions for each type of layer: got {sorted(rope)}. Choose one: "
                "Rotary.from_config({**config, 'rope_parameters': config['rope_parameters'][type]})."
            )
        found = {**config, **rope}
        base = found.get("rope_theta") or found.get("rotary_emb_base") or 10000.0
        base = float(base) if is_number(base) else base
        return cls(base=base, fraction=_fraction(found), scaling=_scaling(rope, config))

    def to_config(self, head_size: int | None = None) -> dict[str, Any]:
        """Return what a Hugging Face config says of these rotary positions.

        Args:
          head_size: Needed for `NTK`, which a config knows only as a larger base.

        Raises:
          ShapeError: If no config can say it: neighbours, several axes, a scaling of one's own; or the head
            size does not fall into pairs.

        >>> Rotary(fraction=0.5).to_config()
        {'rope_theta': 10000.0, 'partial_rotary_factor': 0.5, 'rope_scaling': None}
        """
        base, scaling = self.base, self.scaling
        turned = None if head_size is None else self.size(head_size)
        if self.interleaved or self.axes is not None:
            raise ShapeError(
                f"a Hugging Face config says nothing of interleaved={self.interleaved} and axes={self.axes}: "
                "its models fix them. Write the config of dataclasses.replace(rotary, interleaved=False, "
                "axes=None)."
            )
        if isinstance(scaling, NTK):
            if turned is None:
                raise ShapeError(
                    "NTK is a larger base, which the head size decides: got head_size=None. "
                    "Call to_config(head_size=key_dim)."
                )
            base, scaling = scaling.base(base, turned), None
        said = None if scaling is None else _said(scaling)
        return {"rope_theta": base, "partial_rotary_factor": self.fraction, "rope_scaling": said}

    def size(self, head_size: int) -> int:
        """Return how many features of a head turn.

        Raises:
          ShapeError: If they do not fall into pairs for every axis.
        """
        integer("head_size", head_size, 1, 2**31 - 1, "It is key_dim of the layer.")
        size = round(head_size * self.fraction)
        pair = 2 * len(self.axes or (0,))
        if size % pair or size == 0:
            axes = "" if self.axes is None else f" and axes={self.axes}"
            raise ShapeError(
                f"rotary positions turn pairs of features: got head size {head_size}, of which "
                f"fraction={self.fraction} is {size}{axes}. Expected a multiple of {pair}; change key_dim or "
                "fraction."
            )
        return size

    def frequencies(self, head_size: int) -> Float[np.ndarray, "pairs"]:
        """Return the angle of every pair of one axis at position 1, in float64."""
        size = self.size(head_size) // len(self.axes or (0,))
        return (self.scaling or Scaling()).frequencies(self.base, size)

    def __call__(
        self, x: Float[ArrayLike, "*B L N H"], positions: Int[ArrayLike, "..."]
    ) -> Float[Array, "*B L N H"]:
        """Turn queries or keys.

        Args:
          x: Projected queries or keys.
          positions: [*#B, L], leading axes broadcast or left out; with `axes` places in the folded axes, or
            coordinates [*#B, L, A] of as many axes as x has but one.

        Returns:
          The same in the dtype of `x`; angles and products are in float32, in float64 for float64.

        Raises:
          ShapeError: If the head size has no pairs, or positions do not fit.

        >>> x = jnp.ones((2, 5, 3, 8))
        >>> Rotary()(x, jnp.arange(5) + 7).shape
        (2, 5, 3, 8)
        """
        x = jnp.asarray(as_array("x", x, "floating-point numbers [*B, L, N, H]"))
        if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ShapeError(
                f"x must be floating-point numbers [*B, L, N, H]: got {x.dtype}{list(x.shape)}. Project the "
                "input first; the heads are an axis of their own."
            )
        dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        size = self.size(x.shape[-1])
        angles = self._angles(x, positions, dtype)[..., None, :]
        cos, sin = (jnp.asarray(magnitude, dtype) * f(angles) for f in (jnp.cos, jnp.sin))
        turning = x[..., :size].astype(dtype)
        if self.interleaved:
            pairs = turning.reshape(*turning.shape[:-1], size // 2, 2)
            a, b = (jax.lax.index_in_dim(pairs, i, -1, keepdims=False) for i in (0, 1))
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turning.shape)
        else:  # in place of an axis of two, for which a TPU would lay out all of it anew
            a, b = jnp.split(turning, 2, -1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        turned = turned.astype(x.dtype)
        return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], -1)

    def _angles(self, x: Array, positions: Any, dtype: Any) -> Float[Array, "*B L pairs"]:
        """Return the angles of every token's pairs, those of one axis after the other."""
        if not isinstance(positions, (jax.Array, np.ndarray)):
            positions = as_array("positions", positions, "integers [*B, L]")
        lead, rank = x.shape[:-2], positions.ndim
        coordinates = self.axes is not None and rank == len(lead) + 1
        shape = positions.shape[:-1] if coordinates else positions.shape
        fits = len(shape) <= len(lead) and all(a in (1, b) for a, b in zip(shape[::-1], lead[::-1]))
        if coordinates:
            fits = fits and positions.shape[-1] == len(self.axes or ())
        if not fits or shape[-1:] != lead[-1:] or not jnp.issubdtype(positions.dtype, jnp.integer):
            raise ShapeError(
                f"rotary positions must be integers [*B, L] = {lead}, batch axes of 1 or left out broadcast: "
                f"got {positions.dtype}{list(positions.shape)}. Pass tokens.positions, jnp.arange(L) say; "
                "with axes, coordinates [*B, L, A] do as well."
            )
        if self.axes is None:
            parts = [positions]
        elif coordinates:
            parts = [positions[..., i] for i in range(len(self.axes))]
        else:
            inside = [math.prod(self.axes[i + 1 :]) for i in range(len(self.axes))]
            parts = [positions // n % axis for n, axis in zip(inside, self.axes)]
        frequencies = jnp.asarray(self.frequencies(x.shape[-1]), dtype)
        angles = [
            jnp.asarray(p).astype(dtype)[..., None] * frequencies.reshape((1,) * p.ndim + (-1,))
            for p in parts
        ]
        whole = angles[0] if len(angles) == 1 else jnp.concatenate(angles, -1)
        return whole.reshape((1,) * (len(lead) + 1 - whole.ndim) + whole.shape)


_BY_NAME = {cls.__name__: cls for cls in (Linear, NTK, Llama3, YaRN)}


def to_plain(rotary: Rotary) -> dict[str, Any]:
    """Return rotary positions as plain JSON values.

    Raises:
      ShapeError: If they have a scaling of one's own.
    """
    scaling, axes = rotary.scaling, rotary.axes
    if scaling is not None and _BY_NAME.get(type(scaling).__name__) is not type(scaling):
        raise ShapeError(
            f"rotary has a scaling that no configuration can name, {type(scaling).__name__}: expected "
            f"one of {', '.join(_BY_NAME)}."
        )
    said = scaling and {"name": type(scaling).__name__} | dataclasses.asdict(scaling)
    fields = {"base": rotary.base, "fraction": rotary.fraction, "interleaved": rotary.interleaved}
    return fields | {"scaling": said, "axes": None if axes is None else list(axes)}


def from_plain(values: Mapping[str, Any]) -> Rotary:
    """Return the rotary positions that `to_plain` wrote.

    Raises:
      ShapeError: If it did not.
    """
    said = dict(values.get("scaling") or {})
    scaling = _BY_NAME.get(said.pop("name", ""))
    known = [field.name for field in dataclasses.fields(Rotary)]
    if not set(values) <= set(known) or (said and scaling is None):
        raise ShapeError(
            f"rotary must be mj.Rotary(...) or what a layer's configuration has of it, {', '.join(known)}: "
            f"got {dict(values)}. A Hugging Face config is read by mj.Rotary.from_config(config)."
        )
    return Rotary(**{**values, "scaling": None if scaling is None else scaling(**said)})
