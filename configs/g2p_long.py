"""Spelling to pronunciation, trained four times as long as `configs/g2p.py`.

python -m mha_jax.train --config=configs/g2p_long.py
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the experiment; every key can be set by `--config.<key>=<value>`."""
    path = pathlib.Path(__file__).with_name("g2p.py")
    spec = importlib.util.spec_from_file_location("g2p", path)
    short = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(short)
    config = short.get_config()
    config.steps = 5000
    return config
