"""The working directory of a run: which experiment it belongs to, and whether it may be used.

A folder holds a run as soon as it holds a checkpoint. What a start that died before leaves, the next
start takes.
"""

import contextlib
import json
import math
import operator
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

from mha_jax.errors import ConfigError, WorkdirError
from mha_jax.files import DamageError, parse_json, reading, reason

CARD, LOCK, RESULT = "run.json", "run.lock", "result.json"
CHECKPOINTS, DAMAGED = "checkpoints", "damaged-"
FREE_TO_CHANGE = {"resume", "tensorboard", "log_every", "save_every", "mesh"}


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def write_figures(workdir: pathlib.Path, figures: Mapping[str, float]) -> None:
    """Write what a run has come to; null, where a figure is no number: JSON has no NaN."""
    finite = {name: x if math.isfinite(x) else None for name, x in figures.items()}
    write_whole(workdir / RESULT, json.dumps(finite, allow_nan=False))


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Tell in a sentence that a folder is full, read-only or gone.

    Raises:
      WorkdirError: In the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be written: {reason(error)}. Make room there, or pass another --workdir; "
            "what is saved can be continued with --config.resume."
        ) from error


@contextlib.contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[None]:
    """Make the folder of a run if it is absent, and keep other processes out of it.

    The system lets go of the lock when the process ends, however it ends.

    Raises:
      WorkdirError: It is a file or in use, holds something else than a run, or cannot be written.
    """
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"{workdir} is a file. Pass --workdir=FOLDER.")
    left = {LOCK, CARD, f"{CARD}.tmp"}
    with writing(workdir):
        found = {path.name for path in workdir.iterdir()} if workdir.is_dir() else set()
        if CARD not in found and found - left:
            raise WorkdirError(
                f"{workdir} is not empty and holds no run of ours. Pass a new --workdir."
            )
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    with file:
        try:
            _lock(file)
        except BlockingIOError as error:
            raise WorkdirError(
                f"{workdir} is in use by another process. Wait for its end, or pass another --workdir."
            ) from error
        except OSError as error:
            print(
                f"{workdir} cannot be locked ({reason(error)}): see that no other run uses it.",
                file=sys.stderr,
            )
        yield


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_card(workdir: pathlib.Path) -> dict[str, Any]:
    """Read what a run wrote about itself: `config` and `task`.

    Raises:
      WorkdirError: The folder is no working directory of a run, or its card is damaged.
    """
    path = workdir / CARD
    if not path.is_file():
        raise WorkdirError(
            f"{workdir} holds no run: there is no {CARD} in it. "
            f"Expected the --workdir of an earlier `python -m mha_jax.train`."
        )
    with reading(str(path), "Expected what a run writes about itself; train again.", WorkdirError):
        card = parse_json(path.read_bytes())
        if not isinstance(card["config"], dict) or not isinstance(card["task"], dict):
            raise DamageError("its `config` and `task` are no objects")
        return {"config": card["config"], "task": card["task"]}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the leaves of nested dictionaries by dotted paths.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def kept(config: Any) -> dict[str, Any]:
    """Return an experiment as JSON keeps it: NumPy's numbers as Python's, tuples as lists.

    Raises:
      ConfigError: If it holds what JSON cannot keep.
    """
    try:
        text = json.dumps(config.to_dict(), default=operator.methodcaller("item"))
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config holds what cannot be written down: {error}. Expected numbers, texts, True or False, and "
            "lists of them. Nothing was started."
        ) from error
    return json.loads(text)


def open_workdir(workdir: pathlib.Path, config: Any, task: dict[str, Any]) -> None:
    """Begin a run in a folder that is claimed, or check that it belongs to the run to be continued.

    Args:
      workdir: The folder.
      config: The experiment.
      task: What the task needs to be used later, as JSON.

    Raises:
      WorkdirError: The folder holds another run, or a run that was not asked to be continued, or cannot
        be written.
    """
    card = {"config": kept(config), "task": json.loads(json.dumps(task))}
    with writing(workdir):
        steps = any(path.name.isdigit() for path in workdir.glob(f"{CHECKPOINTS}/*"))
        holds = (workdir / CARD).exists() and (steps or any(workdir.glob(f"{DAMAGED}*")))
        if not holds and not (config.resume and (workdir / CARD).exists()):
            return write_whole(workdir / CARD, json.dumps(card, indent=1))
    if not config.resume:
        raise WorkdirError(
            f"{workdir} holds a run already; nothing was changed. "
            f"Continue it with --config.resume, or pass another --workdir."
        )
    before, now = flatten(read_card(workdir)), flatten(card)
    changed = [
        f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.removeprefix("config.") not in FREE_TO_CHANGE
    ]
    if changed:
        raise WorkdirError(
            f"{workdir} holds another run: {'; '.join(changed[:3])}. "
            f"Pass its settings, or another --workdir."
        )
