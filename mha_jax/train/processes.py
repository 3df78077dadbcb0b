"""The processes of a run, one or many: who speaks and writes, and what all of them agree on.

Process 0 alone prints, locks the folder and writes figures and pictures; of a checkpoint every process writes
what its devices have. What one process finds out and all must act on is agreed on first.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mha_jax.errors import ConfigError, MhaError, WorkdirError


def join(address: str | None, count: int | None, index: int | None, detect: bool) -> None:
    """Join the processes of a run, if it has several.

    Args:
      address, count, index: `coordinator_address`, `num_processes` and `process_id` of
        `jax.distributed.initialize`; all of them, or none where `detect` finds them.
      detect: Whether JAX finds the processes itself: on TPU pods, under Slurm, Open MPI or Kubernetes.

    Raises:
      ConfigError: Some are missing, or the processes were not found.
    """
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 and not detect:
        return
    if missing and not detect:
        raise ConfigError(
            f"--{', --'.join(missing)} missing. Expected --coordinator_address=HOST:PORT of process 0, "
            "--num_processes=N and --process_id from 0 to N - 1; or --distributed, where JAX finds them."
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(address, count, index)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the processes of the run were not found: {error} Pass --coordinator_address=HOST:PORT, "
            "--num_processes=N and --process_id=I to each of them."
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which speaks and writes."""
    return jax.process_index() == 0


def by_first(work: Callable[[], Any]) -> None:
    """Let process 0 do something; the others go on when it is done.

    Raises:
      MhaError: Of `work` in process 0; WorkdirError in the others.
    """
    if jax.process_count() == 1:
        return work()
    error = None
    if is_first():
        try:
            work()
        except MhaError as failed:
            error = failed
    if agreed(error is None):
        return None
    raise error or WorkdirError(
        "process 0 cannot use the folder of the run. Its own error says why."
    )


def agreed(fine: bool) -> bool:
    """Whether all processes say that it is fine."""
    if jax.process_count() == 1:
        return fine
    return bool(multihost_utils.process_allgather(np.asarray(fine)).all())


def gathered(x: Any) -> np.ndarray:
    """Return an array of devices of all processes as NumPy, in each of them."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def copied(tree: Any) -> Any:
    """Copy arrays: to this process's memory, or on their devices where other processes have some of them."""
    if jax.process_count() == 1:
        return jax.tree.map(np.array, tree)
    return jax.jit(lambda x: jax.tree.map(jnp.copy, x))(tree)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Print nothing: what the first process says is said."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def asked_to_end(caught: list[int], step: int) -> int | None:
    """Return the signal that ends the run after this step, the same step in every process.

    Args:
      caught: Signals that this process has caught.
      step: The step that is done. Several processes ask JAX, which tells all of them of the first SIGTERM.
    """
    if jax.process_count() > 1:
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
    return caught[0] if caught else None
