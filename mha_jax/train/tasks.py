"""What the training loop needs to know of a task, and the table of tasks.

A batch is a pure function of the step, so the position in the data is the step and nothing else:
a run that continues at step n sees what an unbroken run would have seen.
"""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax

from mha_jax.train.settings import check_settings

Batch = Mapping[str, Any]

TASKS = {
    "g2p": "mha_jax.train.g2p:Spelling",
    "digits": "mha_jax.train.digits:Digits",
    "lm": "mha_jax.train.lm:Characters",
    "translation": "mha_jax.train.translation:Translation",
    "decoder": "mha_jax.train.lm:ModernCharacters",
}


@runtime_checkable
class Task(Protocol):
    """Data, loss and judgement of one task.

    Attributes:
      model: The Flax model.
      best: The validation figure that ranks checkpoints; lower is better.
      data: What there is to learn from, in words.
    """

    model: nn.Module
    best: str
    data: str

    def __init__(self, config: Any): ...

    def inputs(self, batch: Batch) -> tuple[jax.typing.ArrayLike, ...]:
        """The model's positional arguments."""
        ...

    def batch(self, step: int) -> Batch:
        """The training batch of a step, as NumPy arrays."""
        ...

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The mean loss of a batch."""
        ...

    def validate(self, params: Any) -> dict[str, float]:
        """Figures on data kept out of training and out of the final judgement; seconds."""
        ...

    def judge(self, params: Any, workdir: pathlib.Path) -> dict[str, float]:
        """The final figures; prints a sample and writes pictures into `workdir`."""
        ...

    def card(self) -> dict[str, Any]:
        """What `predict` needs beside the configuration, as JSON."""
        ...


def make_task(config: Any) -> Task:
    """Build the task that `config.task` names.

    Raises:
      ConfigError: There is no such task, or a setting cannot be meant.
    """
    check_settings(config)
    module, _, name = TASKS[config.task].partition(":")
    return getattr(importlib.import_module(module), name)(config)
