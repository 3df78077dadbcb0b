"""The loss of a sequence of symbols."""

import jax
import jax.numpy as jnp
import optax


def token_loss(
    logits: jax.Array, answers: jax.Array, *, smoothing: float = 0.0, pad: int | None = None
) -> jax.Array:
    """Average the cross-entropy over the symbols that are real.

    Args:
      logits: `[B, T, W]`.
      answers: The right symbols `[B, T]`.
      smoothing: Share of the probability spread over all symbols (section 5.4 of the paper: 0.1).
      pad: The symbol that does not count; None counts all.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7 (label smoothing).

    >>> logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    >>> round(float(token_loss(logits, jnp.array([[1, 0]]), pad=0)), 4)
    1.3863
    """
    labels = optax.smooth_labels(jax.nn.one_hot(answers, logits.shape[-1]), smoothing)
    losses = optax.softmax_cross_entropy(logits, labels)
    if pad is None:
        return jnp.mean(losses)
    real = (answers != pad).astype(losses.dtype)
    return jnp.sum(losses * real) / jnp.sum(real)
