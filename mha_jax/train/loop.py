"""The training loop: from a configuration to parameters, continuing where a run was cut off.

All that a run is at a step is its state, {"params", "optimizer"}, and the step's number: the batch
and the dropout key are pure functions of the step. So a run that is killed and started again ends
with the same bits; on other devices, with the same numbers up to rounding.
"""

import contextlib
import math
import pathlib
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mha_jax.train.checkpoints import Checkpoints
from mha_jax.train.layout import Layout
from mha_jax.train.optimizer import make_optimizer
from mha_jax.train.processes import asked_to_end, is_first
from mha_jax.train.progress import Metrics, Nowhere, Progress
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
    """Collect SIGTERM and SIGINT in a list instead of dying of them; the second SIGINT kills.

    SIGTERM of one of several processes is JAX's, which tells the others.
    """
    caught: list[int] = []

    def note(number, _):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    before = {n: signal.signal(n, note) for n in ours}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def initial_state(
    task: Task, optimizer: optax.GradientTransformation, seed: int, layout: Layout | None = None
) -> State:
    """Draw the parameters and start the optimizer, where they lie on the devices."""

    def init(inputs) -> State:
        params = task.model.init(jax.random.key(seed), *inputs)["params"]
        return {"params": params, "optimizer": optimizer.init(params)}

    inputs = task.inputs(jax.tree.map(lambda x: x[:1], task.batch(0)))
    if layout is None:
        return jax.jit(init)(inputs)
    places = layout.of_state(jax.eval_shape(init, inputs), optimizer)
    return jax.jit(init, out_shardings=places)(inputs)


def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    layout: Layout | None = None,
    places: Any = None,
):
    """Build the compiled function `(state, batch, step) -> (state, loss)`; the state is donated.

    Args:
      task, optimizer, seed: Of the run.
      layout: How it lies on devices; None for one.
      places: Where the state lies, as `layout.of_state` says.
    """

    @partial(jax.jit, donate_argnums=0, out_shardings=None if places is None else (places, None))
    def train_step(state: State, batch, step) -> tuple[State, jax.Array]:
        dropout = jax.random.fold_in(jax.random.key(seed), step)

        def loss_of(params):
            inputs = task.inputs(batch)
            outputs, collected = task.model.apply(
                {"params": params},
                *(inputs if layout is None else layout.cut(inputs)),
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


class Run:
    """A run that is ready to start: everything that can be refused has been.

    Args:
      config: The experiment.
      task: Its task.

    Attributes:
      parameters: How many numbers the model learns.

    Raises:
      MhaError: The model, the optimizer or a batch do not fit.

    Cost: Traces the first step; computes nothing.
    """

    def __init__(self, config: Any, task: Task):
        constraint = config.model.to_dict().get("kernel_constraint")
        self.config, self.task = config, task
        self.optimizer = make_optimizer(config.optimizer, config.steps, constraint)
        self.layout = Layout(config)
        state = jax.eval_shape(lambda: initial_state(task, self.optimizer, config.seed))
        places = self.layout.of_state(state, self.optimizer)
        self.step = make_step(task, self.optimizer, config.seed, self.layout, places)
        jax.eval_shape(self.step, state, task.batch(0), 1)
        self.parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state["params"]))

    def __str__(self) -> str:
        devices = jax.devices()
        count = 1 if self.layout.mesh is None else len(devices)
        return (
            f"{self.config.task}: {self.parameters:,} parameters on {count} x "
            f"{devices[0].device_kind}; {self.task.data}"
        )

    def begin(self) -> State:
        """Return the state before the first step, on its devices."""
        return initial_state(self.task, self.optimizer, self.config.seed, self.layout)

    def train(self, workdir: pathlib.Path) -> Any:
        """Train to `config.steps`, from the newest checkpoint in `workdir` if there is one.

        Returns:
          The parameters, whole on one device.

        Raises:
          Stopped: SIGTERM or SIGINT came; everything up to the step it names is saved.
          WorkdirError: A checkpoint or a figure could not be written.
        """
        config, task, layout, seen = self.config, self.task, self.layout, set()
        checkpoints = Checkpoints(workdir, task.best)
        start, state = checkpoints.restore(self.begin())
        if start:
            print(f"continuing from step {start:,} of {config.steps:,}")
        metrics = Metrics(workdir, start, config.tensorboard) if is_first() else Nowhere()
        progress = Progress(start, config.steps)
        losses = []

        def save(step: int, state: State) -> None:
            with contextlib.nullcontext() if "validate" in seen else progress.uncounted():
                figures = task.validate(layout.whole(state["params"]))
            seen.add("validate")
            metrics.write(step, figures)
            progress.note(figures)
            checkpoints.save(step, state, figures)

        def advance(step: int, state: Any) -> tuple[State, jax.Array]:
            batch = task.batch(step - 1)
            shapes = str(jax.tree.map(jnp.shape, batch))
            batch = layout.placed(batch)
            if shapes in seen:
                return self.step(state, batch, step)
            seen.add(shapes)
            jax.block_until_ready(state)
            with progress.uncounted(steps=1):  # It is compiled for every new shape of a batch.
                return jax.block_until_ready(self.step(state, batch, step))

        with (
            catch_signals() as caught,
            contextlib.closing(metrics),
            contextlib.closing(checkpoints),
        ):
            for step in range(start + 1, config.steps + 1):
                state, loss = advance(step, state)
                losses.append(loss)
                stopping = asked_to_end(caught, step)
                if step % config.save_every == 0 or step == config.steps or stopping:
                    save(step, state)
                if step % config.log_every == 0 or step == config.steps:
                    figures = {"loss": float(jnp.stack(losses).mean())}
                    losses.clear()
                    metrics.write(step, figures)
                    progress.show(step, figures)
                if stopping:
                    checkpoints.wait()
                    raise Stopped(stopping, step)
            checkpoints.wait()
        return layout.whole(state["params"])
