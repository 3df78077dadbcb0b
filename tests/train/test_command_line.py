"""Every mistake on the command line or in a folder is one clear line, and nothing is overwritten."""

import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from mha_jax.errors import ConfigError, WorkdirError
from mha_jax.train.command import NAMED, find_config
from mha_jax.train.tasks import make_task
from mha_jax.train.workdir import CARD, claimed, open_workdir, read_card

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "mha_jax.train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=lm", "--config.stepps=3"],
            'Did you mean "steps" instead of "stepps"',
        ),
        (["--config=lm", "--config.model.widht=3"], 'Did you mean "width"'),
        (["--config=lm", "--config.steps=many"], "--config.steps=many"),
        (["--config=configs/no_such.py"], "error: --config=configs/no_such.py is no experiment"),
        (["--config", "lm", "--config.steps=many"], "--config.steps=many"),
        (["--config=../lm"], "error: --config=../lm is no experiment and no file. Expected one of"),
        (["--config=configs/../lm.py"], "is no experiment and no file"),
        (["--config=lm", "--config.task=../../lm"], "config.task='../../lm' is not a task"),
        ([], "error: no experiment was named. Pass --config=g2p"),
        (
            ["--config.steps=3"],
            "error: --config.steps sets a key of an experiment, and none was named",
        ),
        (["--config=lm", "steps=3"], "error: unexpected argument 'steps=3'"),
        (["--config=lm", "--config.task=lmm"], "error: config.task='lmm' is not a task"),
        (["--config=vaswani_base"], "error: config.data='' is not a file"),
        (
            ["--config=digits", "--config.steps=30"],
            "error: config.optimizer.warmup=50 is not below",
        ),
        (
            ["--config=digits", "--config.model.num_heads=5"],
            "error: width must be a multiple of num",
        ),
        (
            ["--config=digits", "--config.model.num_heads=2", "--config.model.width=34"],
            "error: positions are half sines, half",
        ),
        (
            ["--config=lm", "--config.length=99999"],
            "error: config.length=99999 with config.batch_size",
        ),
    ],
)
def test_mistakes_end_with_one_clear_line(arguments, message, tmp_path):
    code, text = run(*arguments, f"--workdir={tmp_path / 'run'}")
    assert code != 0
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_experiments_are_listed_and_found_by_their_names():
    code, text = run("--list")
    assert code == 0
    assert all(f"--config={name} " in text for name in ("digits", "g2p", "g2p_long", "lm"))
    found = {str(find_config(name)) for name in ("g2p", "g2p.py", "configs/g2p.py")}
    assert found == {str(NAMED["g2p"])}
    with pytest.raises(ConfigError, match=r"--config=/etc/g2p is no experiment and no file"):
        find_config("/etc/g2p")


def test_a_file_of_the_users_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("lm").write_text("")
    assert find_config("lm") == pathlib.Path("lm")


def config(**changes):
    base = {"task": "lm", "seed": 0, "model": {"width": 8}, "log_every": 1, "resume": False}
    return ConfigDict(base | changes)


def test_a_new_folder_is_made_and_described(tmp_path):
    workdir = tmp_path / "a" / "b"
    with claimed(workdir):
        open_workdir(workdir, config(), {"classes": 3})
    assert read_card(workdir) == {"config": config().to_dict(), "task": {"classes": 3}}


def test_a_folder_with_a_run_needs_resume(tmp_path):
    open_workdir(tmp_path, config(), {})
    (tmp_path / "checkpoints" / "300").mkdir(parents=True)
    before = (tmp_path / CARD).read_bytes()
    with pytest.raises(WorkdirError, match=r"holds a run already.*--config.resume, or.*--workdir"):
        open_workdir(tmp_path, config(), {})
    open_workdir(tmp_path, config(resume=True, log_every=7), {})
    assert (tmp_path / CARD).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "task", "message"),
    [
        ({"seed": 1}, {}, "config.seed is 0 there and 1 here"),
        ({"model": {"width": 9}}, {}, "config.model.width is 8 there and 9 here"),
        ({"task": "digits"}, {}, "config.task is 'lm' there and 'digits' here"),
        ({}, {"symbols": ["a"]}, r"task.symbols is None there and \['a'\] here"),
    ],
)
def test_another_run_is_not_continued(tmp_path, changes, task, message):
    open_workdir(tmp_path, config(), {})
    with pytest.raises(WorkdirError, match=f"holds another run: {message}"):
        open_workdir(tmp_path, config(resume=True, **changes), task)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(WorkdirError, match="not empty and holds no run"), claimed(tmp_path):
        pytest.fail("it was claimed")
    with pytest.raises(WorkdirError, match="is a file"), claimed(tmp_path / "mine.txt"):
        pytest.fail("it was claimed")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"config": {}}', '{"config": 1, "task": 2}', "[" * 10**5]
)
def test_a_damaged_card_is_named(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(WorkdirError, match=rf"{CARD} cannot be read: .*train again\."):
        read_card(tmp_path)


def test_no_card_is_no_run(tmp_path):
    with pytest.raises(WorkdirError, match=r"holds no run: there is no run\.json"):
        read_card(tmp_path)


def test_unknown_task_lists_the_tasks():
    with pytest.raises(ConfigError, match="Expected one of g2p, digits, lm, translation"):
        make_task(config(task="chess"))
