"""What no model can have: sizes that are no sizes, rates that are no shares, heads that do not fit."""

import dataclasses
from typing import Any

from mha_jax.attention.given import is_integer, is_number, switch
from mha_jax.errors import ShapeError


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
