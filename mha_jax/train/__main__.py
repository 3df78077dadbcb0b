"""Train a model: `python -m mha_jax.train --config=configs/g2p.py [--config.steps=100 ...]`."""

import json
import pathlib
import sys
import time

from absl import app, flags
from ml_collections import config_flags

from mha_jax.errors import MhaError
from mha_jax.train.errors import ConfigError
from mha_jax.train.progress import clock

BEGUN = time.monotonic()

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: configs/<name>.py.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for results; by default workdir/<config.task>."
)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parse the command line, ending with one line of explanation where it is wrong."""
    try:
        rest = app.parse_flags_with_usage(arguments)
    except AttributeError as error:
        sys.exit(f"error: the config has no key {' '.join(str(error).split()).strip(chr(39))}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected argument {rest[1]!r}. Settings look like --config.key=value.")
    return rest


def run() -> None:
    """Train, then judge."""
    if CONFIG.value is None:
        raise ConfigError("no experiment was named. Pass --config=configs/g2p.py, for example.")
    try:
        config = CONFIG.value.copy_and_resolve_references()
    except OSError as error:
        raise ConfigError(f"the config file cannot be read. {error}") from error

    from mha_jax.train.loop import train
    from mha_jax.train.progress import draw_metrics
    from mha_jax.train.tasks import make_task
    from mha_jax.train.workdir import open_workdir, write_whole

    task = make_task(config)
    workdir = open_workdir(
        pathlib.Path(WORKDIR.value or f"workdir/{config.task}"), config, task.card()
    )
    params = train(config, task, workdir)
    figures = task.judge(params, workdir)
    draw_metrics(workdir)
    seconds = time.monotonic() - BEGUN
    write_whole(workdir / "result.json", json.dumps(figures | {"seconds": round(seconds, 1)}))
    print(f"results in {workdir}; {clock(seconds)} in all")


def main(_) -> None:
    from mha_jax.train.checkpoints import say_things_once
    from mha_jax.train.loop import Stopped

    if not flags.FLAGS["verbosity"].present:
        say_things_once()
    try:
        run()
    except MhaError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(f"stopped by {stopped}. Continue with --config.resume.", file=sys.stderr)
        sys.exit(128 + stopped.signal)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
