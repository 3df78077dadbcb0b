"""Decoding with a cache: the most probable next symbol again and again, or the best of a beam.

The encoder runs once and every decoder layer projects its output once; a step then computes one
token a target. All of it is one compiled program, which stops as soon as every target has ended.

B sources   M targets of a source that are decoded together, the beam   W symbols   L most symbols
"""

import math
import numbers
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mha_jax.errors import ShapeError
from mha_jax.models.transformer import Transformer
from mha_jax.types import ArrayLike


@partial(jax.jit, static_argnames=("model", "length", "begin", "end", "pad"))
def greedy(
    model: Transformer,
    params: Any,
    source: ArrayLike,
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
      length: The most symbols a target may have, its end included, L.
      begin: The symbol that every target starts from; never returned.
      end: The symbol that finishes a target.
      pad: The symbol of empty places; never chosen.

    Returns:
      Integers `[B, L]`: the target, then `end` where there is room, then `pad`.

    Cost: One pass through the encoder, then at most L through the decoder over one token a target.
    """
    never = jnp.array([pad, begin])

    def unfinished(state):
        place, _, _, running, _ = state
        return (place < length) & running.any()

    def choose(place, logits, targets, running):
        symbol = logits.at[:, never].set(-jnp.inf).argmax(axis=-1).astype(targets.dtype)
        symbol = jnp.where(running, symbol, jnp.asarray(pad, targets.dtype))
        targets = jax.lax.dynamic_update_index_in_dim(targets, symbol, place, axis=1)
        return symbol, targets, running & (symbol != end)

    def step(state):
        place, symbol, targets, running, caches = state
        logits, caches = following(model, params, symbol, place, caches)
        return place + 1, *choose(place, logits, targets, running), caches

    logits, caches = first(model, params, source, length=length, begin=begin, pad=pad)
    targets = jnp.full((source.shape[0], length), pad, source.dtype)
    chosen = choose(0, logits, targets, jnp.ones(source.shape[0], bool))
    return jax.lax.while_loop(unfinished, step, (1, *chosen, caches))[2]


class Beam(NamedTuple):
    """What beam search carries from place to place: the targets that go on, and the best ended."""

    place: Any
    targets: jax.Array  # [B, M, L], the ones that go on
    scores: jax.Array  # [B, M] log-probabilities, falling; -inf where there is no target
    best: jax.Array  # [B, L], the best target that has ended
    best_score: jax.Array  # [B], by length
    ended: jax.Array  # [B], how many have ended
    caches: Any


def beam_search(
    model: Transformer,
    params: Any,
    source: ArrayLike,
    *,
    length: int,
    begin: int,
    end: int,
    pad: int = 0,
    beam: int = 4,
    length_penalty: float = 0.6,
) -> tuple[jax.Array, jax.Array]:
    """Decode one target a source: the best that a search of `beam` targets at a time finds.

    Of all continuations by one symbol the `beam` most probable are kept. Those among them that end
    leave the beam and compete by `log P / ((5 + symbols) / 6) ** length_penalty`, the end counted
    as a symbol; so do, at the last place, those that have not ended. A source is done when `beam`
    of its targets have ended, or none that goes on can become the best. A beam of 1 is `greedy`.

    Args:
      model, params, source, length, begin, end, pad: As for `greedy`.
      beam: Targets of a source that are decoded together, M.
      length_penalty: 0 compares plain log-probabilities, which favours short targets.

    Returns:
      Integers `[B, L]` as `greedy` returns them, and their scores `[B]` as compared.

    Raises:
      ShapeError: If `beam` is no positive integer or `length_penalty` is negative.

    Cost: As `greedy` with M targets a source.
    Source: Wu et al. 2016, arXiv:1609.08144, section 7, equation 14, the length normalisation only;
      Vaswani et al. 2017, section 6.1, for the defaults.
    """
    if not isinstance(beam, numbers.Integral) or isinstance(beam, bool) or beam < 1:
        raise ShapeError(
            f"beam must be a positive integer: got {beam!r}. It is the number of targets that are "
            "decoded together; 1 is greedy decoding."
        )
    if not 0 <= length_penalty < math.inf:
        raise ShapeError(
            f"length_penalty must be a number from 0: got {length_penalty!r}. 0 compares plain "
            "log-probabilities, 1 nearly those of a symbol."
        )
    marks = {"length": length, "begin": begin, "end": end, "pad": pad}
    return _beam_search(model, params, source, **marks, beam=beam, penalty=float(length_penalty))


@partial(jax.jit, static_argnames=("model", "length", "begin", "end", "pad", "beam"))
def _beam_search(model, params, source, *, length, begin, end, pad, beam, penalty):
    batch, never = source.shape[0], jnp.array([pad, begin])

    def normalised(score, symbols):
        return score / ((5 + symbols) / 6) ** penalty

    def running(state: Beam):
        reachable = normalised(state.scores[:, 0], length)
        return (state.ended < beam) & (reachable > state.best_score) & (state.place < length)

    def extend(state: Beam, logits) -> tuple[Beam, jax.Array]:
        """Choose the continuations; return also which targets [B, M] they continue."""
        place, going_on = state.place, running(state)
        symbols = logits.shape[-1]
        steps = jax.nn.log_softmax(logits.at[:, never].set(-jnp.inf))
        scores = state.scores[:, :, None] + steps.reshape(batch, beam, symbols)
        # Twice the beam, since as many as the beam may end.
        scores, chosen = jax.lax.top_k(scores.reshape(batch, -1), 2 * beam)
        parents, symbol = chosen // symbols, (chosen % symbols).astype(state.targets.dtype)
        targets = jnp.take_along_axis(state.targets, parents[:, :, None], axis=1)
        targets = jax.lax.dynamic_update_index_in_dim(targets, symbol, place, axis=2)

        ends = symbol == end
        kept = jnp.arange(2 * beam)[None] < beam
        leaves = (ends | (place == length - 1)) & kept & (scores > -jnp.inf)
        finals = jnp.where(leaves, normalised(scores, place + 1), -jnp.inf)
        winner = finals.argmax(axis=1)[:, None]
        final = jnp.take_along_axis(finals, winner, axis=1)[:, 0]
        better = (final > state.best_score) & going_on
        best = jnp.take_along_axis(targets, winner[:, :, None], axis=1)[:, 0]

        scores, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), beam)
        parents = jnp.take_along_axis(parents, order, axis=1)
        beams = Beam(
            place + 1,
            jnp.take_along_axis(targets, order[:, :, None], axis=1),
            scores,
            jnp.where(better[:, None], best, state.best),
            jnp.where(better, final, state.best_score),
            state.ended + jnp.where(going_on, leaves.sum(axis=1), 0),
            state.caches,
        )
        return beams, parents

    def step(state: Beam) -> Beam:
        last = jax.lax.dynamic_index_in_dim(state.targets, state.place - 1, 2, keepdims=False)
        symbol = last.reshape(batch * beam)
        logits, caches = following(model, params, symbol, state.place, state.caches)
        state, parents = extend(state, logits)
        rows = (parents + beam * jnp.arange(batch)[:, None]).reshape(-1)
        return state._replace(caches=_reordered(caches, rows))

    logits, caches = first(model, params, source, length=length, begin=begin, pad=pad)
    logits, caches = jax.tree.map(lambda a: jnp.repeat(a, beam, axis=0), (logits, caches))
    alone = jnp.where(jnp.arange(beam) == 0, 0, -jnp.inf)  # all targets are one as yet
    state = Beam(
        jnp.int32(0),
        jnp.full((batch, beam, length), pad, source.dtype),
        jnp.broadcast_to(alone.astype(logits.dtype), (batch, beam)),
        jnp.full((batch, length), pad, source.dtype),
        jnp.full((batch,), -jnp.inf, logits.dtype),
        jnp.zeros((batch,), jnp.int32),
        caches,
    )
    state, _ = extend(state, logits)
    state = jax.lax.while_loop(lambda state: running(state).any(), step, state)
    return state.best, state.best_score


def first(
    model: Transformer, params: Any, source: ArrayLike, *, length: int, begin: int, pad: int
) -> tuple[jax.Array, Any]:
    """Return the logits `[B, W]` of every target's first symbol, and caches that hold the source."""
    variables, mask = {"params": params}, source != pad
    memory: Any = model.apply(variables, source, mask, method="encode")
    begun = jnp.full((source.shape[0], 1), begin, source.dtype)
    caches = model.empty_caches(source.shape[0], length, source.shape[1], memory.dtype)
    return _decode(model, variables | {"cache": caches}, begun, memory, mask)


def following(
    model: Transformer, params: Any, symbols: jax.Array, place: Any, caches: Any
) -> tuple[jax.Array, Any]:
    """Return the logits `[B, W]` after `symbols` `[B]` at `place`, and the caches with them."""
    variables = {"params": params, "cache": caches}
    return _decode(model, variables, symbols[:, None], None, start=place)


def _decode(model: Transformer, variables: Any, *inputs: Any, **options: Any) -> Any:
    logits, kept = model.apply(variables, *inputs, **options, method="decode", mutable=["cache"])
    return logits[:, 0], kept["cache"]


def _reordered(caches: Any, rows: jax.Array) -> Any:
    """Let every target go on from its parent's tokens; the memory is the same for all of a source."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: a[rows] if "self_attention" in jax.tree_util.keystr(path) else a, caches
    )
