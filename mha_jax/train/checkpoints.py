"""Checkpoints of a run, by orbax: written in the background, whole or not at all, by all its processes.

The newest two are kept, and the best by a validation figure. Each carries digests of its arrays, so
that one damaged on disk is found out, named and passed over for the one before it. Arrays come back to
where those of a template lie, on whatever devices they were saved.
"""

import hashlib
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mha_jax.errors import WorkdirError
from mha_jax.files import reason
from mha_jax.train.processes import agreed, by_first, copied, gathered, is_first
from mha_jax.train.workdir import CHECKPOINTS, DAMAGED, writing

DIGESTS = "digests"
# What orbax and its file formats raise on files that are missing, cut short or changed.
DAMAGE = OSError, ValueError, KeyError, TypeError


def say_things_once() -> None:
    """Silence what orbax prints of a failed read or write beside raising it.

    That is its log, and callbacks that find their event loop closed. For the main program only.
    """
    show = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook
    logging.set_verbosity(logging.FATAL)


def digest(tree: Any) -> str:
    """Hash every array of a tree: its path, dtype, shape and bytes."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(gathered(leaf))
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def read(manager: ocp.CheckpointManager, step: int, template: Mapping[str, Any]) -> dict[str, Any]:
    """Read the trees that `template` names from one checkpoint, and check them.

    Raises:
      OSError, ValueError, KeyError, TypeError: The checkpoint is damaged or does not fit.
    """

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    shapes = jax.tree.map(like, dict(template))
    trees = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
    saved = manager.restore(
        step, args=ocp.args.Composite(**trees, **{DIGESTS: ocp.args.JsonRestore()})
    )
    for name in template:
        if digest(saved[name]) != saved[DIGESTS][name]:
            raise ValueError(f"the arrays of {name!r} do not match their digest")
    return {name: saved[name] for name in template}


def newest(
    manager: ocp.CheckpointManager,
    template: Mapping[str, Any],
    on_damage: Callable[[int, Exception], None],
) -> tuple[int, dict[str, Any]] | None:
    """Read the newest checkpoint that is not damaged; report each one that is."""
    for step in sorted(manager.all_steps(), reverse=True):
        error: Exception | None = None
        try:
            found = read(manager, step, template)
        except DAMAGE as damage:
            found, error = {}, damage
        if agreed(error is None):
            return step, found
        on_damage(step, error or OSError("another process cannot read it"))
    return None


def read_params(workdir: pathlib.Path, params: Any) -> Any:
    """Read the newest parameters of a run and change nothing on disk.

    Args:
      workdir: The working directory of the run.
      params: A tree of the same structure, shapes and dtypes.

    Raises:
      WorkdirError: There is no checkpoint that can be read.
    """
    folder = (workdir / CHECKPOINTS).absolute()
    if not folder.is_dir():
        raise WorkdirError(f"{workdir} has no checkpoint yet. Train first, or longer.")
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), params)
    options = ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        found = newest(manager, {"params": params}, report)
    if found is None:
        raise WorkdirError(f"{folder} has no checkpoint that can be read. Train again.")
    return found[1]["params"]


def report(step: int, error: Exception) -> None:
    """Say that a checkpoint is damaged."""
    if not is_first():
        return
    print(
        f"checkpoint {step} is damaged ({reason(error)}); trying the one before it",
        file=sys.stderr,
    )


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`, for the run that writes them.

    Args:
      workdir: The working directory of the run.
      best: The validation figure that ranks checkpoints; lower is better.
    """

    def __init__(self, workdir: pathlib.Path, best: str):
        self.folder = (workdir / CHECKPOINTS).absolute()
        self.best = best
        with writing(workdir):
            self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        def goodness(figures: dict[str, float]) -> float:
            figure = figures.get(self.best, math.nan)
            return -math.inf if math.isnan(figure) else -figure

        keep = AnyPreservationPolicy(policies=[LatestN(n=2), BestN(get_metric_fn=goodness, n=1)])
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, cleanup_tmp_directories=True
            ),
        )

    def save(self, step: int, state: Mapping[str, Any], figures: dict[str, float]) -> None:
        """Begin to write the state after `step` steps; the arrays are copied before this returns.

        Raises:
          WorkdirError: This write or the one before it failed, as on a full disk, or the folder is gone.
        """
        copy = copied(dict(state))
        trees = {name: ocp.args.StandardSave(tree) for name, tree in copy.items()}
        digests = ocp.args.JsonSave({name: digest(tree) for name, tree in copy.items()})
        arguments = ocp.args.Composite(**trees, **{DIGESTS: digests})

        def write() -> None:
            self.folder.stat()  # Where it has vanished, orbax would make it anew, without its run.
            self.manager.save(step, args=arguments, metrics=figures, force=True)

        self._guard(write)

    def wait(self) -> None:
        """Wait until the last write is whole.

        Raises:
          WorkdirError: It failed.
        """
        self._guard(self.manager.wait_until_finished)

    def _guard(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:
            steps = sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())
            good = f"The last good one is step {steps[-1]}" if steps else "There is no other"
            raise WorkdirError(
                f"a checkpoint could not be written: {reason(error)}. "
                f"{good}, in {self.folder}. Make room, then continue with --config.resume."
            ) from error

    def restore(self, template: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
        """Read the newest whole checkpoint; say which ones are damaged and put them aside.

        Args:
          template: A state of the same structure, shapes and dtypes.

        Returns:
          The step and the state; step 0 and the template when there is none.
        """
        return newest(self.manager, template, self._put_aside) or (0, template)

    def _put_aside(self, step: int, error: Exception) -> None:
        report(step, error)
        aside = self.folder.with_name(f"{DAMAGED}{step}")
        self.manager.close()

        def move() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
            print(f"checkpoint {step} is now in {aside}", file=sys.stderr)

        by_first(move)
        self.manager = self._open()

    def close(self) -> None:
        """Let go of the folder.

        Raises:
          WorkdirError: A write that was going on failed.
        """
        self._guard(self.manager.close)
