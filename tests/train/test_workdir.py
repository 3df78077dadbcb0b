"""A folder of a run survives kills, full and read-only disks, its own removal and a second process."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from mha_jax.errors import WorkdirError
from mha_jax.train.checkpoints import Checkpoints
from mha_jax.train.progress import Metrics
from mha_jax.train.workdir import (
    CARD,
    LOCK,
    claimed,
    open_workdir,
    read_card,
    write_figures,
    write_whole,
)
from tests.train.test_progress import events

STATE = {"params": np.arange(12.0)}


def config(**changes):
    return ConfigDict({"task": "lm", "seed": 0, "resume": False} | changes)


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


# A child that kills itself at the n-th thing that it asks of the file system.
KILLED = """
    import os, pathlib, signal, sys
    from ml_collections import ConfigDict
    from mha_jax.train.progress import Metrics
    from mha_jax.train.workdir import claimed, open_workdir

    root, config = pathlib.Path(sys.argv[1]), ConfigDict({"task": "lm", "seed": 0, "resume": False})
    EVENTS = ("open", "os.mkdir", "os.rename", "os.listdir", "os.scandir", "fcntl.flock")

    def start(workdir, config):
        with claimed(workdir):
            open_workdir(workdir, config, {})
            metrics = Metrics(workdir, 0, tensorboard=False)
            metrics.write(1, {"loss": 0.5})
            metrics.close()

    for number in range(100):
        workdir = root / str(number)
        child = os.fork()
        if not child:
            left = [number]

            def kill(event, _):
                if event in EVENTS:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            start(workdir, config)
            os._exit(0)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        config.seed = number
        start(workdir, config)
        print(workdir, flush=True)
        if not killed:
            break
    assert number >= 8, number
"""


def test_a_start_that_is_killed_anywhere_leaves_a_folder_that_the_next_start_takes(tmp_path):
    """With other settings even, as long as there is no checkpoint."""
    done = run(KILLED, tmp_path)
    assert done.returncode == 0, done.stderr
    workdirs = [pathlib.Path(line) for line in done.stdout.split()]
    for number, workdir in enumerate(workdirs):
        assert read_card(workdir)["config"]["seed"] == number
        names = {path.name for path in workdir.iterdir()}
        assert names - {"metrics.csv.tmp"} == {CARD, LOCK, "metrics.csv"}


def test_a_folder_without_a_checkpoint_is_begun_anew(tmp_path):
    open_workdir(tmp_path, config(), {})
    open_workdir(tmp_path, config(seed=1), {})
    assert read_card(tmp_path)["config"]["seed"] == 1
    with pytest.raises(
        WorkdirError, match=r"holds another run: config\.seed is 1 there and 2 here"
    ):
        open_workdir(tmp_path, config(seed=2, resume=True), {})
    (tmp_path / "damaged-300").mkdir()
    with pytest.raises(WorkdirError, match="holds a run already"):
        open_workdir(tmp_path, config(seed=1), {})


def test_a_second_process_is_refused(tmp_path):
    code = """
        import pathlib, sys
        from mha_jax.errors import WorkdirError
        from mha_jax.train.workdir import claimed
        try:
            with claimed(pathlib.Path(sys.argv[1])):
                print("claimed")
        except WorkdirError as error:
            sys.exit(f"error: {error}")
    """
    with claimed(tmp_path):
        done = run(code, tmp_path)
        assert done.returncode == 1 and "is in use by another process. Wait for" in done.stderr
        with pytest.raises(WorkdirError, match="in use by another"), claimed(tmp_path):
            pytest.fail("it was claimed twice")
    assert run(code, tmp_path).stdout == "claimed\n"


def test_a_killed_process_lets_go(tmp_path):
    code = """
        import os, pathlib, signal, sys
        from mha_jax.train.workdir import claimed
        with claimed(pathlib.Path(sys.argv[1])):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run(code, tmp_path).returncode == -9
    with claimed(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("mha_jax.train.workdir._lock", refuse)
    with claimed(tmp_path):
        pass
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().err


@contextlib.contextmanager
def mounted(folder, options):
    """Mount a small file system of its own, where the tests may."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_disk_is_told_before_anything_runs(tmp_path):
    with mounted(tmp_path / "disk", "size=64k,ro") as disk:
        message = r"cannot be written: .*Read-only file system"
        with pytest.raises(WorkdirError, match=message), claimed(disk / "run"):
            pytest.fail("it was claimed")
        assert not (disk / "run").exists()


def test_a_disk_that_fills_keeps_what_is_saved(tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk, claimed(disk / "run"):
        workdir = disk / "run"
        open_workdir(workdir, config(), {})
        metrics = Metrics(workdir, 0, tensorboard=False)
        checkpoints = Checkpoints(workdir, "error")
        checkpoints.save(1, STATE, {"error": 0.5})
        checkpoints.wait()
        card = (workdir / CARD).read_bytes()
        big = {"params": np.random.default_rng(0).standard_normal(10**6)}
        with pytest.raises(
            WorkdirError, match=r"could not be written: .*The last good one is step 1"
        ):
            checkpoints.save(2, big, {"error": 0.4})
            checkpoints.wait()
        (disk / "filler").write_bytes(b"")
        with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(WorkdirError, match=r"cannot be written: .*No space left on device"):
            for step in range(10**5):
                metrics.write(step, {"loss": 0.5})
        with pytest.raises(WorkdirError, match=r"No space left"):
            open_workdir(disk, config(), {"symbols": ["a"] * 10_000})
        assert (workdir / CARD).read_bytes() == card
        (disk / "filler").unlink()
        with contextlib.suppress(WorkdirError):
            checkpoints.close()
        checkpoints = Checkpoints(workdir, "error")
        step, found = checkpoints.restore(STATE)
        checkpoints.close()
        assert step == 1 and (found["params"] == STATE["params"]).all()


def test_a_folder_that_vanishes_is_told(tmp_path):
    workdir = tmp_path / "run"
    with claimed(workdir):
        open_workdir(workdir, config(), {})
        checkpoints = Checkpoints(workdir, "error")
        checkpoints.save(1, STATE, {"error": 0.5})
        checkpoints.wait()
        shutil.rmtree(workdir)
        with pytest.raises(WorkdirError, match=r"could not be written: .*No such file.*no other"):
            checkpoints.save(2, STATE, {"error": 0.4})
        assert not workdir.exists()
        with pytest.raises(WorkdirError, match=r"run cannot be written: .*No such file"):
            open_workdir(workdir, config(), {})
        with pytest.raises(WorkdirError, match=r"run cannot be written: .*No such file"):
            Metrics(workdir, 0, tensorboard=False)


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    real = time.time
    pytest.importorskip("tensorboardX")
    checkpoints = Checkpoints(tmp_path, "error")
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3):
        monkeypatch.setattr(time, "time", lambda step=step: real() - 10**8 * step)
        metrics.write(step, {"loss": 0.5})
        checkpoints.save(step, {"params": STATE["params"] + step}, {"error": 1 / step})
        checkpoints.wait()
    checkpoints.close()
    metrics.close()
    checkpoints = Checkpoints(tmp_path, "error")
    step, found = checkpoints.restore(STATE)
    checkpoints.close()
    assert step == 3 and (found["params"] == STATE["params"] + 3).all()
    assert events(tmp_path) == [(1, "loss", 0.5), (2, "loss", 0.5), (3, "loss", 0.5)]
    assert Metrics(tmp_path, 3, tensorboard=False).begun <= time.monotonic()


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_whole(path, json.dumps([1]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, json.dumps([2]))
    assert path.read_text() == "[1]"


def test_figures_that_are_no_numbers_are_null(tmp_path):
    write_figures(tmp_path, {"bits": math.nan, "rate": math.inf, "seconds": 1.5})
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "bits": None,
        "rate": None,
        "seconds": 1.5,
    }
