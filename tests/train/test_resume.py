"""A run that is killed, stopped or damaged ends with the bits of one that was left alone."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

pytest.importorskip("orbax.checkpoint")

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "steps": 30,
    "batch_size": 16,
    "length": 64,
    "model.width": 8,
    "model.num_heads": 2,
    "model.hidden": 16,
    "model.encoder_layers": 1,
    "model.sliding_window": 7,
    "optimizer.warmup": 3,
    "log_every": 1,
    "save_every": 3,
    "tensorboard": False,
}


def start(workdir, *more, limit=None):
    """Start a run; a limit on the bytes of a file stands for a full disk.

    Runs beside each other share what XLA compiled; the run that is broken off and the one that is left
    alone do not.
    """
    limits = (
        None if limit is None else partial(resource.setrlimit, resource.RLIMIT_FSIZE, [limit] * 2)
    )
    settings = [f"--config.{key}={value}" for key, value in TINY.items()]
    command = [sys.executable, "-m", "mha_jax.train", "--config=configs/lm.py", *settings, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command.append(f"--workdir={workdir}")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | cache, preexec_fn=limits, **pipes)


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def wait_for(process, text):
    """Read what a run prints until the text comes."""
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the run ended without {text!r}: {process.stderr.read()}")


def wait_for_file(process, workdir, pattern):
    """Wait until a file is there among the checkpoints: `*tmp*` while one is being written."""
    until = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < until:
        if any((workdir / "checkpoints").glob(pattern)):
            return
        time.sleep(0.0005)
    pytest.fail(f"no {pattern} was seen: {process.stderr.read()}")


def digests(workdir):
    """Return the sha256 of the parameters and of the optimizer's state at the end."""
    folder = workdir / "checkpoints" / str(TINY["steps"]) / "digests"
    return json.loads(next(p for p in folder.iterdir() if p.name == "metadata").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    code, out, err = finish(start(workdir))
    assert code == 0, err
    assert "step 30/30" in out and "left" in out and "bits a character" in out
    return workdir


def test_killed_stopped_and_damaged_run_ends_with_the_same_bits(unbroken, tmp_path):
    workdir = tmp_path / "run"

    process = start(workdir)
    wait_for(process, "step 1/30")
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL

    process = start(workdir, "--config.resume")
    wait_for_file(process, workdir, "*tmp*")
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL

    process = start(workdir, "--config.resume")
    wait_for_file(process, workdir, "6")
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL

    code, _, err = finish(start(workdir, "--config.resume", limit=1000))
    assert code == 1, err
    assert "error: a checkpoint could not be written" in err and "The last good one is step" in err
    assert "Traceback" not in err

    process = start(workdir, "--config.resume")
    wait_for(process, "step 20/30")
    process.terminate()
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in err and "Continue with --config.resume" in err

    code, out, err = finish(start(workdir, "--config.resume"))
    assert code == 0, err
    assert "continuing from step" in out
    assert digests(workdir) == digests(unbroken)

    for path in (workdir / "checkpoints" / "30" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-3])
    code, out, err = finish(start(workdir, "--config.resume"))
    assert code == 0, err
    assert "checkpoint 30 is damaged" in err and "continuing from step" in out
    assert digests(workdir) == digests(unbroken)

    rows = (workdir / "metrics.csv").read_text().splitlines()
    steps = [row.split(",")[0] for row in rows if ",loss," in row]
    assert steps == [str(step) for step in range(1, 31)]


def test_another_seed_gives_other_bits(unbroken):
    workdir = unbroken.parent / "another"
    code, _, err = finish(start(workdir, "--config.seed=1"))
    assert code == 0, err
    assert digests(workdir)["params"] != digests(unbroken)["params"]
