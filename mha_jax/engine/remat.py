"""What `jax.checkpoint` may keep of attention, by name."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from mha_jax.errors import ArgumentError

NAMES = ("q", "k", "v", "out", "lse")


def remat_policy(save: Collection[str] = ("out", "lse")) -> Callable[..., Any]:
    """Return a policy of `jax.checkpoint` that keeps named parts of every attention, and nothing else.

    The names are `attention_q`, `attention_k`, `attention_v` (projected, rotated), `attention_out` (before
    its projection) and `attention_lse` (two statistics of every row): of JAX's own policies, too.

    Args:
      save: Some of "q", "k", "v", "out", "lse". With "out" and "lse" the backward pass attends no second
        time; with all five it projects no second time either.

    Raises:
      ArgumentError: For a part that there is not.

    >>> f = jax.checkpoint(lambda x: mj.dot_product_attention(x, x, x).sum(), policy=remat_policy())
    >>> jax.grad(f)(jnp.ones((1, 5, 2, 4))).shape
    (1, 5, 2, 4)
    """
    parts = (save,) if isinstance(save, str) else save
    listed = isinstance(parts, (tuple, list, set, frozenset))
    unknown = [x for x in (parts if listed else [save]) if not (isinstance(x, str) and x in NAMES)]
    if unknown:
        raise ArgumentError(
            f"remat_policy saves parts of an attention: got {unknown[0]!r}. Expected some of "
            f"{', '.join(map(repr, NAMES))}."
        )
    return jax.checkpoint_policies.save_only_these_names(*(f"attention_{name}" for name in parts))
