"""Data files of installed packages, and endless shuffled batches of rows, by grain.

A data file is found with `importlib.util.find_spec`, which runs none of the package's code, and is
checked against its sha256 before it is read.
"""

import hashlib
import importlib.util
import pathlib
from collections.abc import Mapping

import grain
import numpy as np

from mha_jax.train.errors import DataError


def read_checked(package: str, file: str, sha256: str, requirement: str) -> bytes:
    """Read a data file out of an installed package.

    Args:
      package: The package's import name; it is not imported.
      file: The file's path inside it.
      sha256: The file's expected digest.
      requirement: What to install when it is absent or another one.

    Raises:
      DataError: The package or the file is absent, or the file is not the expected one.
    """
    install = f"Install it with: pip install {requirement}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package}, which holds the data, is not installed. {install}")
    path = pathlib.Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise DataError(f"the package {package} has no file {path}. {install}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise DataError(
            f"{path} has sha256 {digest}, expected {sha256}: another version, or damaged. {install}"
        )
    return data


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
