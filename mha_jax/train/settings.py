"""Settings of a run that cannot be meant, refused before anything is written.

The sizes of the model are checked by its own `Config`.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

from mha_jax.errors import ConfigError
from mha_jax.models.transformer import Config
from mha_jax.train.layout import parse
from mha_jax.train.modern import Modern
from mha_jax.train.workdir import kept

Rule = tuple[Callable[[Any], bool], str]


def _number(value: Any, kind: Any = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


_COUNT: Rule = (lambda x: _number(x, numbers.Integral) and x >= 1, "a whole number from 1 on")
_SHARE: Rule = (lambda x: _number(x) and 0 <= x < 1, "a number from 0 to below 1")
_AMOUNT: Rule = (lambda x: _number(x) and x >= 0, "a finite number from 0 on")
_SWITCH: Rule = (lambda x: isinstance(x, bool), "True or False")
_LAYERS: Rule = (lambda x: x is None or _COUNT[0](x), _COUNT[1])
_TEXT: Rule = (lambda x: isinstance(x, str), "text")

EVERY_RUN: dict[str, Rule] = {
    "seed": (
        lambda x: _number(x, numbers.Integral) and 0 <= x < 2**31,
        "a whole number from 0 to 2147483647",
    ),
    "steps": _COUNT,
    "batch_size": _COUNT,
    "log_every": _COUNT,
    "save_every": _COUNT,
    "tensorboard": _SWITCH,
    "resume": _SWITCH,
    "optimizer.schedule": _TEXT,
    "optimizer.peak": (lambda x: _number(x) and x > 0, "a finite number above 0"),
    "optimizer.warmup": _COUNT,
    "optimizer.weight_decay": _AMOUNT,
    "optimizer.clip": _AMOUNT,
}
OF_TASK: dict[str, dict[str, Rule]] = {
    "g2p": {
        "model.decoder_layers": _LAYERS,
        "label_smoothing": _SHARE,
        "buckets": (
            lambda x: isinstance(x, (tuple, list)) and all(_COUNT[0](y) for y in x),
            "lengths in a tuple",
        ),
    },
    "digits": {},
    "lm": {"length": _COUNT},
    "translation": {
        "model.decoder_layers": _LAYERS,
        "data": _TEXT,
        "vocabulary": _COUNT,
        "label_smoothing": _SHARE,
    },
    "decoder": {"length": _COUNT},
}
# What config.model names, where it is not the sizes of a Transformer.
MODELS: dict[str, Any] = {"decoder": Modern}


def check_settings(config: Any) -> None:
    """Refuse a configuration that cannot be meant.

    Args:
      config: The experiment, as `get_config()` returns it.

    Raises:
      ConfigError: Naming every setting that is missing or wrong, its value and what was expected.
    """
    task = config.get("task")
    if not isinstance(task, str) or task not in OF_TASK:
        raise ConfigError(
            f"config.task={task!r} is not a task. Expected one of {', '.join(OF_TASK)}."
        )
    wrong = []
    for name, (fits, expected) in (EVERY_RUN | OF_TASK[task]).items():
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if hasattr(value, "get") else None
        if not fits(value):
            wrong.append(f"config.{name}={value!r}, expected {expected}")
    model = config.get("model")
    known = {field.name for field in dataclasses.fields(MODELS.get(task, Config))}
    unknown = [] if not hasattr(model, "keys") else sorted(set(model.keys()) - known)
    if not hasattr(model, "keys") or unknown:
        what = f"config.model has {', '.join(unknown)}" if unknown else f"config.model={model!r}"
        wrong.append(f"{what}, expected some of {', '.join(sorted(known))}")
    mesh = config.get("mesh", "")  # those of before have none
    if not isinstance(mesh, str):
        wrong.append(
            f"config.mesh={mesh!r}, expected text, data:4,model:2 say, or '' for one device"
        )
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}. Nothing was started.")
    kept(config)
    if mesh:
        parse(mesh)
    optimizer = config.optimizer
    if optimizer.schedule != "paper" and optimizer.warmup >= config.steps:
        raise ConfigError(
            f"config.optimizer.warmup={optimizer.warmup} is not below config.steps={config.steps}: the rate "
            f"would never reach its peak. Pass --config.optimizer.warmup={config.steps // 10}, or more steps."
        )
