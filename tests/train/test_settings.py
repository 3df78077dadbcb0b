"""Settings that cannot be meant are refused, each by its name, before anything is written."""

import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from mha_jax import ShapeError
from mha_jax.errors import ConfigError
from mha_jax.models import bert
from mha_jax.models.transformer import Config
from mha_jax.train.command import NAMED
from mha_jax.train.configs import decoder, g2p, lm, vaswani_base
from mha_jax.train.settings import check_settings
from mha_jax.train.workdir import kept
from tests.train.test_configs import load

NAN, INF = float("nan"), float("inf")
WRONG = {
    "seed": [-1, 0.5, True, 2**31, "0", None],
    "steps": [0, -5, 1.5, NAN, "9", None],
    "batch_size": [0, -1, 2.0, True],
    "log_every": [0, -1, 0.5],
    "save_every": [0, -1, INF],
    "tensorboard": [1, "yes", None],
    "resume": [0, "no", None],
    "optimizer.schedule": [3, None],
    "optimizer.peak": [0.0, -1e-3, NAN, INF, "big", None],
    "optimizer.warmup": [0, -1, 1.5, NAN],
    "optimizer.weight_decay": [-0.1, NAN, INF],
    "optimizer.clip": [-1.0, NAN, INF, None],
}
OF_TASKS = [
    (g2p, "label_smoothing", [1.0, -0.1, NAN]),
    (g2p, "buckets", [(), (6, 0), ("a",), 11, (1.5, 11)]),
    (g2p, "model.decoder_layers", [0, -1, 1.5]),
    (lm, "length", [0, -1, 2.5, NAN]),
    (decoder, "length", [0, None]),
    (vaswani_base, "vocabulary", [0, -3, 1.5]),
    (vaswani_base, "data", [3, None]),
    (vaswani_base, "label_smoothing", [1.5]),
    (vaswani_base, "model.decoder_layers", [0]),
]
CASES = [(g2p, name, value) for name, values in WRONG.items() for value in values]
CASES += [(module, name, value) for module, name, values in OF_TASKS for value in values]


def changed(module, name, value):
    tree = module.get_config().to_dict()
    *path, last = name.split(".")
    inner = tree
    for part in path:
        inner = inner[part]
    inner[last] = value
    return ConfigDict(tree)


@pytest.mark.parametrize(("module", "name", "value"), CASES)
def test_a_setting_that_cannot_be_meant_is_named(module, name, value):
    if value == ():
        return check_settings(changed(module, name, value))  # The task says what buckets must be.
    with pytest.raises(ConfigError, match=rf"config\.{name}=.*, expected .*Nothing was started"):
        check_settings(changed(module, name, value))


def test_what_is_missing_is_named():
    for name in [*WRONG, "label_smoothing", "buckets"]:
        tree = g2p.get_config().to_dict()
        *path, last = name.split(".")
        del (tree[path[0]] if path else tree)[last]
        with pytest.raises(ConfigError, match=rf"config\.{name}=None, expected"):
            check_settings(ConfigDict(tree))
    for task in (None, "../g2p", 3, [1]):
        with pytest.raises(ConfigError, match=r"is not a task\. Expected one of g2p, digits"):
            check_settings(changed(g2p, "task", task))
    with pytest.raises(ConfigError, match=r"config\.model has heads, expected some of .*num_heads"):
        check_settings(changed(g2p, "model.heads", 4))
    for model in (None, 3):
        with pytest.raises(ConfigError, match=r"config\.model=.*expected some of"):
            check_settings(changed(g2p, "model", model))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warmup_longer_than_the_run_is_refused(schedule):
    config = changed(g2p, "optimizer.schedule", schedule)
    config.steps = config.optimizer.warmup
    with pytest.raises(ConfigError, match=r"warmup=200 is not below config\.steps=200.*warmup=20,"):
        check_settings(config)
    config.optimizer.schedule = "paper"  # It has no end that the warmup could miss.
    check_settings(config)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_our_own_settings_can_be_meant(name):
    check_settings(load(name)[1])


SIZES = [
    *[({"width": x}, "width must be a whole number from 1") for x in (0, -8, 8.0, NAN, True, "8")],
    *[({"num_heads": x}, "num_heads must be a whole number") for x in (0, -2, 2.0, None)],
    ({"hidden": 0}, "hidden must be a whole number from 1"),
    *[
        ({"dropout": x}, "dropout must be a number from 0 to below 1")
        for x in (1.0, -0.1, NAN, "0")
    ],
    ({"num_heads": 3}, "width must be a multiple of num_heads: got width=8 and num_heads=3"),
]
OF_TRANSFORMER = [
    ({"encoder_layers": -1}, "encoder_layers must be a whole number from 0"),
    ({"decoder_layers": 1.5}, "decoder_layers must be a whole number from 0"),
    ({"attention_dropout": 1}, "attention_dropout must be a number"),
    *[({"norm_first": x}, "norm_first must be True or False") for x in ("no", 1, NAN, None)],
]
OF_BERT = [
    ({"vocabulary": 0}, "vocabulary must be"),
    ({"positions": -1}, "positions must be"),
    ({"segments": 0}, "segments must be"),
    ({"embedding": 0}, "embedding must be"),
]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [(Config, *case) for case in SIZES + OF_TRANSFORMER]
    + [(bert.Config, *case) for case in SIZES + OF_BERT],
)
def test_sizes_of_models_that_cannot_be_meant(config, changes, message):
    with pytest.raises(ShapeError, match=message):
        config(**{"width": 8, "num_heads": 2} | changes)


def test_numbers_of_numpy_are_kept_as_those_of_python():
    config = changed(g2p, "steps", np.int64(400))
    config.note = {"rate": np.float32(0.5), "sizes": (1, np.int32(2))}
    check_settings(config)
    card = kept(config)
    assert card["steps"] == 400 and card["note"] == {"rate": 0.5, "sizes": [1, 2]}


@pytest.mark.parametrize("value", [{1, 2}, object(), np.ones(2), 1j, pathlib.Path("x")])
def test_what_cannot_be_written_down_is_refused(value):
    config = changed(g2p, "steps", 400)
    config.note = value
    with pytest.raises(ConfigError, match=r"cannot be written down.*Nothing was started"):
        check_settings(config)
