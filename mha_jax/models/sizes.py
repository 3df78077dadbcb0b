"""What no model can have: sizes that are no sizes, rates that are no shares, heads that do not fit."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mha_jax.attention.fitted import mask_array
from mha_jax.attention.given import integer, integers, is_integer, is_number, of_kind, switch
from mha_jax.errors import ShapeError, UnsupportedError
from mha_jax.types import Array

FLOAT32 = 3.4e38  # the largest number, about


def check_config(config: Any, *rates: str, **least: int) -> None:
    """Refuse sizes, rates and switches of a model's configuration that cannot be meant.

    Args:
      config: It, with `width` and `num_heads` among its fields, and perhaps a `head_size` that frees them.
      rates: Fields that are shares, from 0 to below 1.
      least: Fields that are whole numbers, and the smallest that each may be.

    Raises:
      ShapeError: Naming the field, its value and what was expected.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        if not is_integer(value) or value < smallest:
            raise ShapeError(f"{name} must be a whole number from {smallest} on: got {value!r}.")
    for name in rates:
        value = getattr(config, name)
        if not is_number(value) or not 0 <= float(value) < 1:
            raise ShapeError(f"{name} must be a number from 0 to below 1: got {value!r}.")
    for field in dataclasses.fields(config):
        if field.type is bool:
            switch(field.name, getattr(config, field.name))
    if getattr(config, "head_size", None) is None and config.width % config.num_heads:
        raise ShapeError(
            f"width must be a multiple of num_heads: got width={config.width} and "
            f"num_heads={config.num_heads}. Every head has width / num_heads features."
        )


def check_numbers(config: Any, **least: float) -> None:
    """Refuse fields of a model's configuration that are no finite numbers.

    Args:
      config: It.
      least: Names of fields, and the smallest number that each may be.

    Raises:
      ShapeError: Naming the field, its value and what was expected.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        if not is_number(value) or not smallest <= float(value) < math.inf:
            raise ShapeError(
                f"{name} must be a finite number from {smallest:.3g} on: got {value!r}."
            )


def check_named(config: Any, **known: Any) -> None:
    """Refuse fields that are none of the names they may be.

    Raises:
      ShapeError: Naming the field, its value and what was expected.
    """
    for name, names in known.items():
        if getattr(config, name) not in tuple(names):
            raise ShapeError(
                f"{name} must be one of {', '.join(names)}: got {getattr(config, name)!r}."
            )


def symbols(name: str, x: Any, count: int) -> Array:
    """Return numbers of symbols, [B, T]; those that are known are below `count`.

    Raises:
      ShapeError: If they are none: a lookup gives NaN, or the last ones for negative numbers.
    """
    hint = f"They are numbers of {count} symbols, [B, T]."
    return integers(name, x, [(None, None)], 0, count - 1, hint)


def reals(name: str, mask: Any, tokens: Array) -> Array:
    """Return which tokens [B, T] are real, as booleans.

    Raises:
      ShapeError: If it says something else.
    """
    mask = mask_array(mask, name)
    fits = mask.ndim == 2 and all(a in (1, b) for a, b in zip(mask.shape, tokens.shape))
    if not fits or mask.shape[1] != tokens.shape[1]:
        raise ShapeError(
            f"{name} must have the shape of the tokens, {tokens.shape}, True at real ones: got {mask.shape}."
        )
    return mask


class Published(dict):
    """A Hugging Face config that says in words what it lacks, and what of it cannot be meant."""

    def __missing__(self, name: str) -> Any:
        raise UnsupportedError(
            f"the config has no {name!r}, which the family {self.get('model_type')!r} needs: it has "
            f"{', '.join(map(str, self)) or 'nothing'}. Pass all of its config.json as a dictionary."
        )

    def count(self, name: str) -> int:
        """Return how many layers there are, under a name.

        Raises:
          ShapeError: If that is no count.
        """
        return integer(name, self[name], 0, 2**20, "It counts the layers of the model.")

    def size(self, name: str, usual: int | None = None, least: int = 1) -> int:
        """Return a size, the usual one where the config does not say it.

        Raises:
          ShapeError: If that is none.
          UnsupportedError: If it is not said, and there is no usual one.
        """
        found = self[name] if usual is None else self.get(name, usual)
        return integer(name, found, least, 2**31 - 1, "Pass the model's config.json as it is.")

    def refuse(self, **expected: Any) -> None:
        """Refuse what the decoder has not; what a config does not say is as expected.

        Raises:
          UnsupportedError: Naming it.
        """
        for name, value in expected.items():
            if (found := self.get(name)) not in (None, value):
                raise UnsupportedError(
                    f"the config has {name}={found!r}, where the decoder can be {value!r} alone. Build the "
                    "model of the layer by hand."
                )


def published(config: Any, usual: Mapping[str, Mapping[str, Any]] | None = None) -> Published:
    """Return a config that tells what is missing; that of the text where it has one.

    Args:
      config: As it was published.
      usual: What transformers takes where a config of a family leaves something out, by `model_type`.

    Raises:
      ShapeError: If it is no dictionary.
    """
    for _ in range(2):
        of_kind(
            "config",
            config,
            Mapping,
            "Pass config.to_dict() of Hugging Face, or its config.json read.",
        )
        config = config.get("text_config") or config
    family = config.get("model_type")
    left_out = (usual or {}).get(family, {}) if isinstance(family, str) else {}
    return Published({**left_out, **config})


def of_each(name: str, found: Any, count: int, kinds: Sequence[str] = ()) -> list[Any]:
    """Return what a config says of each of its layers.

    Args:
      name: What the config calls it.
      found: What it says.
      count: Of layers.
      kinds: What alone can be said; anything if there are none.

    Raises:
      UnsupportedError: If it is no list of so many, or names other kinds.
    """
    listed = isinstance(found, (list, tuple))
    if not listed or len(found) != count:
        got = f"{len(found)} entries" if listed else repr(found)
        raise UnsupportedError(
            f"{name} of the config must list something of each of {count} layers: got {got}. Compare the "
            "config's number of layers."
        )
    unknown = {str(kind) for kind in found if kinds and kind not in kinds}
    if unknown:
        raise UnsupportedError(
            f"{name} of the config names {', '.join(sorted(unknown))}: expected {' and '.join(kinds)}. Other "
            "kinds of attention cannot be read."
        )
    return list(found)
