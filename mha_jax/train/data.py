"""Data files of installed packages, and endless shuffled batches of rows, by grain.

A data file is found with `importlib.util.find_spec`, which runs none of the package's code, and is
checked against its sha256 before it is read.
"""

from collections.abc import Mapping
from functools import partial

import grain
import numpy as np

from mha_jax.errors import DataError
from mha_jax.models import weights

read_checked = partial(weights.read_checked, error=DataError)


def endless(rows: Mapping[str, np.ndarray], batch_size: int, seed: int) -> grain.MapDataset:
    """Shuffle rows anew in every epoch and batch them, for ever.

    Args:
      rows: Arrays of equal length by name.
      batch_size: Rows of a batch; a batch may reach from one epoch into the next.
      seed: Of the shuffling.

    Returns:
      A dataset whose element `i` is batch `i`, computed from `i` alone.

    >>> batches = endless({"x": np.arange(5)}, batch_size=5, seed=0)
    >>> sorted(batches[7]["x"].tolist())
    [0, 1, 2, 3, 4]
    """
    length = len(next(iter(rows.values())))
    indices = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
    batches = indices.batch(batch_size, batch_fn=np.asarray)
    return batches.map(lambda chosen: {name: row[chosen] for name, row in rows.items()})
