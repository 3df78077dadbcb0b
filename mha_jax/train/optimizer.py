"""Learning-rate schedules and the optimizer of a run, made of optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mha_jax.errors import ConfigError
from mha_jax.layer import constraints


def paper_schedule(peak: float, warmup: int) -> optax.Schedule:
    """Rise linearly to `peak` in `warmup` steps, then fall with the square root of the step.

    Args:
      peak: The highest rate; the paper's is `width ** -0.5 * warmup ** -0.5`.
      warmup: Steps of the rise, at least 1.

    Source: Vaswani et al. 2017, section 5.3, equation 3.

    >>> schedule = paper_schedule(0.1, 10)
    >>> [round(float(schedule(step)), 4) for step in (0, 9, 39)]
    [0.01, 0.1, 0.05]
    """

    def schedule(count):
        step = count + 1
        return peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

    return schedule


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """Build the schedule that `config.schedule` names: "paper", "linear" or "cosine".

    Raises:
      ConfigError: There is no such schedule.
    """
    peak, warmup = config.peak, config.warmup
    match config.schedule:
        case "paper":
            return paper_schedule(peak, warmup)
        case "linear":
            rise = optax.linear_schedule(0.0, peak, warmup)
            fall = optax.linear_schedule(peak, 0.0, steps - warmup)
            return optax.join_schedules([rise, fall], [warmup])
        case "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    raise ConfigError(
        f"config.optimizer.schedule={config.schedule!r} is not a schedule. "
        "Expected paper, linear or cosine."
    )


def is_attention(params: Any) -> Any:
    """Mark the parameters of attention layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "attention" in jax.tree_util.keystr(path), params
    )


def make_optimizer(
    config: Any, steps: int, kernel_constraint: Any = None
) -> optax.GradientTransformation:
    """Build Adam with the paper's betas, and what else the configuration sets.

    Args:
      config: `schedule`, `peak`, `warmup`, `clip` (0 is none) and `weight_decay`.
      steps: Length of the run.
      kernel_constraint: Keras's name or config of a constraint of all attention kernels.
    """
    hold = constraints.as_optax(kernel=kernel_constraint)
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.adamw(
            make_schedule(config, steps),
            b1=0.9,
            b2=0.98,
            eps=1e-9,
            weight_decay=config.weight_decay,
        ),
        optax.masked(hold, is_attention) if kernel_constraint else optax.identity(),
    )
