"""The command line of `python -m mha_jax.train`: which experiment, with which settings, where."""

import ast
import contextlib
import os
import pathlib
import sys
import time

from absl import app, flags
from ml_collections import config_flags

from mha_jax.errors import ConfigError
from mha_jax.train import configs
from mha_jax.train.progress import clock

BEGUN = time.monotonic()

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a name that --list shows, or a Python file."
)
LIST = flags.DEFINE_bool("list", False, "List the experiments and do nothing.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for results; by default workdir/<config.task>."
)
ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0 of a run of several processes."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Let JAX find the processes: TPU pods, Slurm, Open MPI, Kubernetes."
)
NAMED = {
    path.stem: path
    for path in sorted(pathlib.Path(configs.__path__[0]).glob("*.py"))
    if path.stem != "__init__"
}


def run(arguments: list[str]) -> None:
    """Run the program; `--help` lists its flags."""
    app.run(main, argv=["python -m mha_jax.train", *arguments], flags_parser=parse_flags)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parse the command line, ending with one line of explanation where it is wrong."""
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == "config":
            if equals:
                arguments[place] = f"--config={find_config(value)}"
            elif place + 1 < len(arguments):
                arguments[place + 1] = str(find_config(arguments[place + 1]))
    names = [argument.lstrip("-").partition("=")[0] for argument in arguments]
    keys = [name for name in names if name.startswith("config.")]
    if keys and "config" not in names:
        raise ConfigError(
            f"--{keys[0]} sets a key of an experiment, and none was named. Pass --config= with one of "
            f"{', '.join(NAMED)}, or with the path of a Python file."
        )
    try:
        rest = app.parse_flags_with_usage(arguments)
    except AttributeError as error:
        # ml_collections repeats quotes and line ends of the cause, escaped.
        text = " ".join(str(error).replace("\\n", ". ").replace("\\", "").strip("'").split())
        sys.exit(f"error: the config has no key {text.replace(chr(39), '')}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected argument {rest[1]!r}. Settings look like --config.key=value.")
    return rest


def find_config(value: str) -> pathlib.Path:
    """Return the file of an experiment.

    Args:
      value: One of the names that `--list` shows, also as `configs/<name>.py`; or a path.

    Raises:
      ConfigError: There is no such name and no such file.
    """
    name = value.removeprefix("configs/").removesuffix(".py")
    if value.startswith("configs/") and name in NAMED:
        return NAMED[name]
    path = pathlib.Path(os.path.normpath(value))  # before links are followed
    if path.is_file():
        return path
    if name not in NAMED:
        raise ConfigError(
            f"--config={value} is no experiment and no file. Expected one of {', '.join(NAMED)}, or "
            "the path of a Python file with a get_config()."
        )
    return NAMED[name]


def list_configs() -> None:
    """Print every experiment with the first line of its file, and when it was run, what came out."""
    for name, path in NAMED.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"  --config={name:<14}{text.splitlines()[0]}")


def main(_) -> None:
    """Train, then judge."""
    from mha_jax.train import processes
    from mha_jax.train.checkpoints import say_things_once
    from mha_jax.train.loop import Stopped

    if LIST.value:
        return list_configs()
    if not flags.FLAGS["verbosity"].present:
        say_things_once()
    processes.join(ADDRESS.value, PROCESSES.value, PROCESS.value, DISTRIBUTED.value)
    try:
        with contextlib.nullcontext() if processes.is_first() else processes.silenced():
            return train()
    except Stopped as stopped:
        if processes.is_first():
            print(f"stopped by {stopped}. Continue with --config.resume.", file=sys.stderr)
        sys.exit(128 + stopped.signal)


def train() -> None:
    """Run the experiment of the command line from its settings to its judgement."""
    if CONFIG.value is None:
        raise ConfigError(
            "no experiment was named. Pass --config=g2p, for example; --list names them all."
        )
    config = CONFIG.value.copy_and_resolve_references()

    from mha_jax.train.loop import Run
    from mha_jax.train.processes import by_first
    from mha_jax.train.progress import draw_metrics
    from mha_jax.train.tasks import make_task
    from mha_jax.train.workdir import claimed, open_workdir, write_figures, writing

    task = make_task(config)
    run = Run(config, task)
    print(run, flush=True)
    workdir = pathlib.Path(WORKDIR.value or f"workdir/{config.task}")
    with contextlib.ExitStack() as claim:

        def begin() -> None:
            claim.enter_context(claimed(workdir))
            open_workdir(workdir, config, task.card())

        by_first(begin)
        print("compiling; the first steps take longest", flush=True)
        params = run.train(workdir)

        def judge() -> None:
            with writing(workdir):
                figures = task.judge(params, workdir)
                draw_metrics(workdir)
                seconds = time.monotonic() - BEGUN
                figures["seconds"] = round(seconds, 1)
                write_figures(workdir, figures)
            print(f"results in {workdir}; {clock(seconds)} in all")

        by_first(judge)
