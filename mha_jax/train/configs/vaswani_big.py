"""The big model of Vaswani et al. 2017 (table 3, last row), on pairs that you bring.

    python -m mha_jax.train --config=vaswani_big --config.data=pairs.npz

Time: the paper's 3.5 days were on 8 GPUs; here the tests compile the training step and train none of
it. Result: BLEU 28.4 in the paper for English to German, not measured here.
"""

from ml_collections import ConfigDict

WIDTH, WARMUP = 1024, 4000


def get_config() -> ConfigDict:
    """Return the experiment; every key can be set by `--config.<key>=<value>`."""
    return ConfigDict(
        {
            "task": "translation",
            "data": "",
            "vocabulary": 37_000,
            "seed": 0,
            "steps": 300_000,
            "batch_size": 256,
            "label_smoothing": 0.1,
            "model": {
                "width": WIDTH,
                "num_heads": 16,
                "hidden": 4096,
                "encoder_layers": 6,
                "decoder_layers": 6,
                "dropout": 0.3,
                "norm_first": False,
            },
            "optimizer": {
                "schedule": "paper",
                "peak": WIDTH**-0.5 * WARMUP**-0.5,
                "warmup": WARMUP,
                "weight_decay": 0.0,
                "clip": 0.0,
            },
            "log_every": 100,
            "save_every": 1000,
            "tensorboard": True,
            "resume": False,
            "mesh": "",
        }
    )
