"""Greedy decoding: the most probable next symbol, again and again."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames=("model", "length", "begin", "end"))
def greedy(
    model: nn.Module,
    params: Any,
    source: jax.Array,
    *,
    length: int,
    begin: int,
    end: int,
    pad: int = 0,
) -> jax.Array:
    """Decode one target a source, taking the most probable symbol at every place.

    Args:
      model: A `Transformer`.
      params: Its parameters.
      source: Tokens `[B, S]`; `pad` where there is none.
      length: The most symbols a target may have, its end included.
      begin: The symbol that every target starts from; never returned.
      end: The symbol that finishes a target.
      pad: The symbol of empty places.

    Returns:
      Integers `[B, length]`: the target, then `end` where there is room, then `pad`.

    Cost: `length` passes through the decoder over `length` places; one compilation for all.
    """
    mask = source != pad
    memory = model.apply({"params": params}, source, mask, method="encode")
    targets = jnp.full((source.shape[0], length + 1), pad, source.dtype).at[:, 0].set(begin)
    running = jnp.ones(source.shape[0], bool)
    never = jnp.array([pad, begin])

    def unfinished(state):
        place, _, running = state
        return (place < length) & running.any()

    def step(state):
        place, targets, running = state
        logits = model.apply({"params": params}, targets[:, :-1], memory, mask, method="decode")
        here = jax.lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False)
        symbol = here.at[:, never].set(-jnp.inf).argmax(axis=-1).astype(targets.dtype)
        symbol = jnp.where(running, symbol, jnp.asarray(pad, targets.dtype))
        targets = jax.lax.dynamic_update_index_in_dim(targets, symbol, place + 1, axis=1)
        return place + 1, targets, running & (symbol != end)

    return jax.lax.while_loop(unfinished, step, (0, targets, running))[1][:, 1:]
