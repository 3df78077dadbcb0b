"""The big model of Vaswani et al. 2017 (table 3, last row), on pairs that you bring.

    python -m mha_jax.train --config=vaswani_big --config.data=pairs.npz

Time: the paper's 3.5 days were on 8 GPUs; here the tests compile the training step and train none of
it. Result: BLEU 28.4 in the paper for English to German, not measured here.
"""

from ml_collections import ConfigDict

from mha_jax.train.configs import vaswani_base

WIDTH, WARMUP = 1024, vaswani_base.WARMUP


def get_config() -> ConfigDict:
    """Return the base model's experiment, larger, longer and with more dropout."""
    config = vaswani_base.get_config()
    model = {"width": WIDTH, "num_heads": 16, "hidden": 4096, "dropout": 0.3}
    optimizer = {"peak": WIDTH**-0.5 * WARMUP**-0.5}
    config.update({"steps": 300_000, "model": model, "optimizer": optimizer})
    return config
