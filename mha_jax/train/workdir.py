"""The working directory of a run: which experiment it belongs to, and whether it may be used."""

import json
import os
import pathlib
from typing import Any

from mha_jax.errors import WorkdirError

CARD = "run.json"
FREE_TO_CHANGE = {"resume", "tensorboard", "log_every", "save_every"}


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


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
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        return {"config": card["config"], "task": card["task"]}
    except (ValueError, KeyError, TypeError) as error:
        raise WorkdirError(f"{path} is damaged ({error!r}); train again elsewhere.") from error


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


def open_workdir(workdir: pathlib.Path, config: Any, task: dict[str, Any]) -> pathlib.Path:
    """Make the folder of a new run, or check that it belongs to the run to be continued.

    Args:
      workdir: The folder; made if absent.
      config: The experiment.
      task: What the task needs to be used later, as JSON.

    Raises:
      WorkdirError: The folder holds another run, or a run that was not asked to be continued.
    """
    card = json.loads(json.dumps({"config": config.to_dict(), "task": task}))
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"{workdir} is a file. Pass --workdir=FOLDER.")
    if not (workdir / CARD).exists():
        if workdir.is_dir() and any(workdir.iterdir()):
            raise WorkdirError(
                f"{workdir} is not empty and holds no run of ours. Pass a new --workdir."
            )
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / CARD, json.dumps(card, indent=1))
        return workdir
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
    return workdir
