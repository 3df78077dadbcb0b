"""Every config opens with its command, its time and its result; the paper's sizes compile."""

import importlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mha_jax.errors import DataError
from mha_jax.models.transformer import Config
from mha_jax.train.command import NAMED
from mha_jax.train.loop import initial_state, make_step
from mha_jax.train.optimizer import make_optimizer
from mha_jax.train.settings import MODELS
from mha_jax.train.tasks import TASKS, make_task
from mha_jax.train.translation import read_pairs

NAMES = sorted(NAMED)


def load(name):
    module = importlib.import_module(f"mha_jax.train.configs.{name}")
    return module, module.get_config()


@pytest.mark.parametrize("name", NAMES)
def test_config_is_complete(name):
    module, config = load(name)
    assert f"python -m mha_jax.train --config={name}" in module.__doc__
    assert "Time:" in module.__doc__ and "Result:" in module.__doc__
    assert config.task in TASKS
    assert config.resume is False
    MODELS.get(config.task, Config)(**config.model.to_dict())
    make_optimizer(config.optimizer, config.steps)
    assert config.optimizer.warmup < config.steps


def write_pairs(path, rows=100, length=11, top=37_000):
    draw = np.random.default_rng(0).integers
    np.savez(path, **{name: draw(1, top, (rows, length)) for name in ("source", "target")})
    return str(path)


# Table 3 of the paper: 65 and 213 million, its rounding and ours of the vocabulary apart.
@pytest.mark.parametrize(("name", "millions"), [("vaswani_base", 63), ("vaswani_big", 214)])
@jax.numpy_dtype_promotion("standard")  # optax raises a float to an integer power
def test_the_papers_models_compile(name, millions, tmp_path):
    """The whole training step, from shapes alone: no parameter is ever made."""
    config = load(name)[1]
    config.update({"data": write_pairs(tmp_path / "pairs.npz"), "batch_size": 3})
    task = make_task(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.eval_shape(lambda: initial_state(task, optimizer, config.seed))
    sizes = [np.prod(x.shape) for x in jax.tree.leaves(state["params"])]
    assert round(sum(sizes) / 1e6) == millions
    step = make_step(task, optimizer, config.seed)
    lowered = step.lower(state, task.batch(0), 1)
    if name == "vaswani_base":  # The big one is the same program, wider.
        lowered.compile()
    new_state, loss = lowered.out_info
    assert loss.shape == ()
    assert jax.tree.map(lambda x: x.shape, new_state) == jax.tree.map(lambda x: x.shape, state)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "is not a file. Expected an .npz"),
        ({"source": np.ones((100, 3), int)}, "cannot be read.*target"),
        ({"source": np.ones((100, 3)), "target": np.ones((100, 3), int)}, "source .* is float64"),
        ({"source": np.ones((100, 3), int), "target": np.ones((9, 3), int)}, r"target .*\(9, 3\)"),
        (
            {"source": np.full((100, 3), 50), "target": np.ones((100, 3), int)},
            "reaches from 50 to 50. Expected 0 to config.vocabulary - 1 = 49",
        ),
        (
            {"source": np.ones((9, 3), int), "target": np.ones((9, 3), int)},
            "has 9 rows. Expected at least 100",
        ),
    ],
)
def test_wrong_pairs_are_named(tmp_path, arrays, message):
    path = tmp_path / "pairs.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        read_pairs(str(path), vocabulary=50)


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "pairs.npz").write_text("no archive")
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(str(tmp_path / "pairs.npz"), vocabulary=50)


def test_translation_learns_to_copy(tmp_path):
    """Pairs of equal sequences: the loss on held-out rows falls well below chance."""
    rows = np.random.default_rng(0).integers(2, 9, (300, 5))
    target = np.concatenate([np.ones((300, 1), int), rows], axis=1)
    np.savez(tmp_path / "pairs.npz", source=rows, target=target)
    config = ConfigDict(load("vaswani_base")[1])
    config.update({"data": str(tmp_path / "pairs.npz"), "vocabulary": 9, "batch_size": 32})
    config.model.update({"width": 16, "num_heads": 2, "hidden": 32, "dropout": 0.0})
    config.model.update({"encoder_layers": 1, "decoder_layers": 1, "norm_first": True})
    config.optimizer.update({"schedule": "linear", "peak": 1e-2, "warmup": 10})
    with jax.numpy_dtype_promotion("standard"):
        task = make_task(config)
        optimizer = make_optimizer(config.optimizer, 150)
        state, step = initial_state(task, optimizer, 0), make_step(task, optimizer, 0)
        before = task.validate(state["params"])["validation_loss"]
        for i in range(150):
            state, _ = step(state, task.batch(i), i + 1)
        after = task.validate(state["params"])["validation_loss"]
    assert before > 0.9 * np.log(7) and after < 0.5 * np.log(7)
