"""The training loop: from a configuration to parameters, continuing where a run was cut off.

All that a run is at a step is its state, {"params", "optimizer"}, and the step's number: the batch
and the dropout key are pure functions of the step. So a run that is killed and started again ends
with the same bits.
"""

import contextlib
import pathlib
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mha_jax.train.checkpoints import Checkpoints
from mha_jax.train.optimizer import make_optimizer
from mha_jax.train.progress import Metrics, Progress
from mha_jax.train.tasks import Task

State = dict[str, Any]


class Stopped(Exception):
    """The process was asked to end; the state is saved.

    Attributes:
      signal: The signal's number.
      step: Steps done and saved.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name} after step {step}, which is saved")
        self.signal, self.step = number, step


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them; the second SIGINT kills."""
    caught: list[int] = []

    def note(number, _):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def initial_state(task: Task, optimizer: optax.GradientTransformation, seed: int) -> State:
    """Draw the parameters and start the optimizer."""

    @jax.jit
    def init(inputs) -> State:
        params = task.model.init(jax.random.key(seed), *inputs)["params"]
        return {"params": params, "optimizer": optimizer.init(params)}

    return init(task.inputs(jax.tree.map(lambda x: x[:1], task.batch(0))))


def make_step(task: Task, optimizer: optax.GradientTransformation, seed: int):
    """Build the compiled function `(state, batch, step) -> (state, loss)`; the state is donated."""

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: State, batch, step) -> tuple[State, jax.Array]:
        dropout = jax.random.fold_in(jax.random.key(seed), step)

        def loss_of(params):
            outputs, collected = task.model.apply(
                {"params": params},
                *task.inputs(batch),
                training=True,
                rngs={"dropout": dropout},
                mutable=["losses"],
            )
            penalty = sum(map(jnp.sum, jax.tree.leaves(collected)), start=0.0)
            return task.loss(outputs, batch) + penalty

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": moments}, loss

    return train_step


def train(config: Any, task: Task, workdir: pathlib.Path) -> Any:
    """Train to `config.steps`, from the newest checkpoint in `workdir` if there is one.

    Returns:
      The parameters.

    Raises:
      Stopped: SIGTERM or SIGINT came; everything up to the step it names is saved.
      WorkdirError: A checkpoint could not be written.
    """
    constraint = config.model.to_dict().get("kernel_constraint")
    optimizer = make_optimizer(config.optimizer, config.steps, constraint)
    checkpoints = Checkpoints(workdir, task.best)
    start, state = checkpoints.restore(initial_state(task, optimizer, config.seed))
    if start:
        print(f"continuing from step {start:,} of {config.steps:,}")
    metrics = Metrics(workdir, start, config.tensorboard)
    progress = Progress(start, config.steps)
    train_step = make_step(task, optimizer, config.seed)
    losses = []

    def save(step: int, state: State) -> None:
        figures = task.validate(state["params"])
        metrics.write(step, figures)
        progress.note(figures)
        checkpoints.save(step, state, figures)

    with catch_signals() as caught, contextlib.closing(metrics), contextlib.closing(checkpoints):
        for step in range(start + 1, config.steps + 1):
            state, loss = train_step(state, task.batch(step - 1), step)
            losses.append(loss)
            stopping = caught[:1]
            if step % config.save_every == 0 or step == config.steps or stopping:
                save(step, state)
            if step % config.log_every == 0 or step == config.steps:
                figures = {"loss": float(jnp.stack(losses).mean())}
                losses.clear()
                metrics.write(step, figures)
                progress.show(step, figures)
            if stopping:
                checkpoints.wait()
                raise Stopped(stopping[0], step)
        checkpoints.wait()
    return state["params"]
