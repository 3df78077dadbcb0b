"""The paper's base model compiled for TPUs that are not there: whole, and over 256 of them."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mha_jax.sharding import partition_specs
from mha_jax.train.loop import initial_state, make_step
from mha_jax.train.optimizer import make_optimizer
from mha_jax.train.tasks import make_task
from tests.test_sharding import exchanges
from tests.train.test_configs import load, write_pairs

pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
from tests.topologies import chips, compiled

P = PartitionSpec


def training(tmp_path, batch_size, length, vocabulary=37_000, **model):
    """Return the base model's training step, the shapes of its arguments, and its optimizer."""
    config = load("vaswani_base")[1]
    rows = max(batch_size * 2, 100)
    pairs = write_pairs(tmp_path / "pairs.npz", rows, length, top=vocabulary)
    config.update({"data": pairs, "batch_size": batch_size, "vocabulary": vocabulary})
    config.model.update(model)
    task = make_task(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.eval_shape(lambda: initial_state(task, optimizer, config.seed))
    arguments = state, task.batch(0), jnp.int32(1)
    return make_step(task, optimizer, config.seed), arguments, optimizer


def count(text, kernel):
    return len(re.findall(rf"custom-call\(.*{kernel}", text))


@jax.numpy_dtype_promotion("standard")  # optax raises a float to an integer power
@jax.default_prng_impl("rbg")  # compiles faster than threefry, in the dropout between layers
def test_a_step_of_the_papers_base_model_compiles_without_anything_of_t_x_s(tmp_path):
    length = 113  # of the sources; the targets have one less, and the kernels' tiles 128
    step, arguments, _ = training(tmp_path, 2, length)
    text = compiled("v5e", step, *arguments).as_text()
    # Six layers of the encoder, two attentions in each of six of the decoder.
    assert count(text, "attention_forward") == count(text, "attention_backward") == 18
    tokens = rf"({length}|{length - 1}|128)"
    assert re.search(rf"\[2,{tokens},512\]", text)
    assert not re.search(rf"\b{tokens},{tokens}\b", text)


@jax.numpy_dtype_promotion("standard")  # optax raises a float to an integer power
@jax.default_prng_impl("rbg")  # compiles faster than threefry, in the dropout between layers
def test_a_step_of_256_chips_gathers_no_q_k_or_v(tmp_path):
    step, (state, batch, number), optimizer = training(
        tmp_path, 256, 128, vocabulary=512, encoder_layers=1, decoder_layers=1, hidden=512
    )
    mesh = Mesh(chips("v5e:16x16").reshape(32, 8), ("data", "model"))
    params = partition_specs(state["params"], {"heads": "model"})
    moments = optax.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        state["optimizer"],
        params,
        transform_non_params=lambda _: P(),
    )
    specs = {"params": params, "optimizer": moments}, {name: P("data") for name in batch}, P()

    def placed(a, spec):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    program = step.lower(*jax.tree.map(placed, (state, batch, number), specs)).compile()
    text = program.as_text()
    assert count(text, "attention_forward") == count(text, "attention_backward") == 3
    assert set(exchanges(program)) == {"all-reduce"}
