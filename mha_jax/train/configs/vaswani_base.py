"""The base model of Vaswani et al. 2017 with its schedule and regularization (tables 3, section 5).

    python -m mha_jax.train --config=vaswani_base --config.data=pairs.npz

The pairs are yours: integers `source` and `target`, padded with 0. Time: the paper's 12 hours were on
8 GPUs; here the tests compile the training step and train none of it. Result: BLEU 27.3 in the paper
for English to German, not measured here. The paper's batch is 25,000 tokens a side.
"""

from ml_collections import ConfigDict

WIDTH, WARMUP = 512, 4000


def get_config() -> ConfigDict:
    """Return the experiment; every key can be set by `--config.<key>=<value>`."""
    return ConfigDict(
        {
            "task": "translation",
            "data": "",
            "vocabulary": 37_000,
            "seed": 0,
            "steps": 100_000,
            "batch_size": 256,
            "label_smoothing": 0.1,
            "model": {
                "width": WIDTH,
                "num_heads": 8,
                "hidden": 2048,
                "encoder_layers": 6,
                "decoder_layers": 6,
                "dropout": 0.1,
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
