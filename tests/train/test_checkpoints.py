"""Checkpoints come back bit for bit; a damaged or unwritable one never costs the one before it."""

import math
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from mha_jax.errors import WorkdirError
from mha_jax.train.checkpoints import Checkpoints, digest, read_params

NAN = math.nan


def state(seed):
    draw = np.random.default_rng(seed).standard_normal
    params = {"kernel": draw((7, 5), np.float32), "bias": draw(3, np.float32)}
    return {"params": params, "optimizer": (params, {"count": np.array(seed, np.int32)})}


def fill(folder, steps):
    checkpoints = Checkpoints(folder, "error")
    for step, error in steps.items():
        checkpoints.save(step, state(step), {"error": error})
        checkpoints.wait()
    checkpoints.close()


def restore(folder):
    checkpoints = Checkpoints(folder, "error")
    step, found = checkpoints.restore(state(0))
    checkpoints.close()
    return step, found


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def test_round_trip_is_bit_equal(tmp_path):
    fill(tmp_path, {3: 0.5})
    step, found = restore(tmp_path)
    assert step == 3
    assert digest(found) == digest(state(3)) != digest(state(4))
    assert jax.tree.structure(found) == jax.tree.structure(state(3))


def test_nothing_to_restore_is_the_beginning(tmp_path):
    step, found = restore(tmp_path)
    assert step == 0 and digest(found) == digest(state(0))


@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ((0.9, 0.1, 0.8, 0.7, 0.6), 2),
        ((0.1, NAN, 0.8, 0.7, 0.6), 1),
        ((NAN, 0.9, 0.1, NAN, NAN), 3),
        ((0.1, math.inf, -math.inf, NAN, 0.6), 3),
    ],
)
def test_newest_two_and_the_best_are_kept(tmp_path, errors, best):
    fill(tmp_path, dict(enumerate(errors, start=1)))
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {best, 4, 5}


def test_arrays_may_change_once_save_has_returned(tmp_path):
    checkpoints, given = Checkpoints(tmp_path, "error"), state(1)
    checkpoints.save(1, given, {"error": 1.0})
    given["params"]["kernel"][:] = 7
    checkpoints.wait()
    checkpoints.close()
    assert digest(restore(tmp_path)[1]) == digest(state(1))


def damage_every_file(folder, how):
    for path in files(folder):
        data = path.read_bytes()
        if how == "emptied":
            path.write_bytes(b"")
        elif how == "cut short":
            path.write_bytes(data[: len(data) // 2])
        elif how == "missing":
            path.unlink()
        else:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["emptied", "cut short", "missing", "changed"])
def test_damage_of_all_files_falls_back(tmp_path, capsys, how):
    fill(tmp_path, {1: 0.5, 2: 0.4})
    damage_every_file(tmp_path / "checkpoints" / "2", how)
    step, found = restore(tmp_path)
    assert step == 1 and digest(found) == digest(state(1))
    assert "checkpoint 2 is damaged" in capsys.readouterr().err
    assert (tmp_path / "damaged-2").is_dir()
    fill(tmp_path, {2: 0.4})
    assert restore(tmp_path)[0] == 2


# A restore that fails leaves an event loop of orbax's behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["cut short", "missing", "changed"])
def test_damage_of_any_one_file_is_survived(tmp_path, how):
    """Either the checkpoint is still whole, bit for bit, or the one before it is used."""
    fill(tmp_path, {1: 0.5, 2: 0.4})
    names = [p.relative_to(tmp_path) for p in files(tmp_path / "checkpoints" / "2")]
    originals = {name: (tmp_path / name).read_bytes() for name in names}
    fell_back = 0
    for name in names:
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "checkpoints", copy / "checkpoints")
        path, data = copy / name, originals[name]
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(
                data[: len(data) // 2] if how == "cut short" else bytes([data[0] ^ 1]) + data[1:]
            )
        step, found = restore(copy)
        assert digest(found) == digest(state(step)) and step in (1, 2), name
        fell_back += step == 1
    assert fell_back >= 2


def test_reading_parameters_changes_nothing_on_disk(tmp_path, capsys):
    fill(tmp_path, {1: 0.5, 2: 0.4})
    damage_every_file(tmp_path / "checkpoints" / "2", "cut short")
    before = {p: p.read_bytes() for p in files(tmp_path)}
    assert digest(read_params(tmp_path, state(0)["params"])) == digest(state(1)["params"])
    assert {p: p.read_bytes() for p in files(tmp_path)} == before
    assert "checkpoint 2 is damaged" in capsys.readouterr().err


def test_no_checkpoint_to_read_is_an_error(tmp_path):
    with pytest.raises(WorkdirError, match="has no checkpoint yet"):
        read_params(tmp_path, state(0)["params"])
    fill(tmp_path, {1: 0.5})
    damage_every_file(tmp_path / "checkpoints" / "1", "emptied")
    with pytest.raises(WorkdirError, match="no checkpoint that can be read"):
        read_params(tmp_path, state(0)["params"])


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk; the write fails in the same place."""
    fill(tmp_path, {1: 0.5})
    script = """
        import resource, signal, sys, pathlib
        import numpy as np
        from mha_jax.train.checkpoints import Checkpoints
        from mha_jax.errors import WorkdirError
        checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), "error")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        big = {"params": np.random.default_rng(0).standard_normal(100_000)}
        try:
            checkpoints.save(2, big, {"error": 0.1})
            checkpoints.wait()
        except WorkdirError as error:
            sys.exit(f"error: {error}")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "error: a checkpoint could not be written" in done.stderr
    assert "The last good one is step 1" in done.stderr and "--config.resume" in done.stderr
    step, found = restore(tmp_path)
    assert step == 1 and digest(found) == digest(state(1))
