"""Attention layers in the files that Keras 3 saves: `.keras`, a zip of JSON and HDF5, and `.weights.h5`.

HDF5 holds a group a layer, found here by what is in it: a group each for the query, key, value and output
projection, with their kernel and bias as `vars/0` and `vars/1`. Its place follows the attributes of the
model: `layers/<class>_<count>` in functional and sequential models. JSON nests the same way, which is how
a group finds its configuration; files since Keras 3.10 or so also name every group.
"""

import json
import os
import re
import zipfile
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from mha_jax.errors import WeightsError

_PROJECTIONS = {
    "query": "query_dense",
    "key": "key_dense",
    "value": "value_dense",
    "gate": "gate_dense",
    "attention_output": "output_dense",
}
_CLASSES = ("MultiHeadAttention", "GroupQueryAttention", "GroupedQueryAttention")


class Stored(NamedTuple):
    """One attention layer of a file; `config` is None where the file has none of it."""

    name: str
    path: str
    config: dict[str, Any] | None
    params: dict[str, dict[str, np.ndarray]]


def read(path: str | os.PathLike[str]) -> list[Stored]:
    """Return every attention layer of a file.

    Raises:
      WeightsError: If it is no file of Keras's, or h5py is missing.
    """
    try:
        import h5py
    except ImportError as error:
        raise WeightsError("reading a file of Keras's needs h5py: pip install h5py.") from error
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            missing = {"config.json", "model.weights.h5"} - set(archive.namelist())
            if missing:
                raise WeightsError(
                    f"{os.fspath(path)} is a zip file without {', '.join(sorted(missing))}, not what Keras "
                    f"saves as .keras: it holds {', '.join(archive.namelist()[:9])}."
                )
            configs = _configs(json.loads(archive.read("config.json")))
            with archive.open("model.weights.h5") as weights, h5py.File(weights, "r") as file:
                return _layers(file, configs)
    if h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            return _layers(file, {})
    with open(path, "rb") as file:
        start = file.read(8)
    raise WeightsError(
        f"{os.fspath(path)} is not a file that Keras saved: it starts with {start!r}. Expected a .keras or "
        ".weights.h5 file, written by model.save or model.save_weights."
    )


def _configs(node: Any, path: str = "") -> dict[str, dict[str, Any]]:
    """Return the configuration of every attention layer, by its place among the weights."""
    if not isinstance(node, dict) or not isinstance(config := node.get("config"), dict):
        return {}
    if node.get("class_name") in _CLASSES:
        return {path: config}
    found: dict[str, dict[str, Any]] = {}
    for attribute, value in config.items():
        place = f"{path}/{attribute}".removeprefix("/")
        if isinstance(value, list):
            counts: dict[str, int] = {}
            for child in value:
                name = _group_name(child)
                count = counts[name] = counts.get(name, -1) + 1
                found |= _configs(child, f"{place}/{name}_{count}" if count else f"{place}/{name}")
        else:
            found |= _configs(value, place)
    return found


def _group_name(node: Any) -> str:
    """Return the name of a layer's group: its class in snake case."""
    name = str(node.get("class_name")) if isinstance(node, dict) else ""
    name = name.replace("GroupQueryAttention", "GroupedQueryAttention")
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _layers(file: Any, configs: dict[str, dict[str, Any]]) -> list[Stored]:
    groups = {"": file}
    file.visititems(
        lambda path, item: groups.update({path: item}) if hasattr(item, "keys") else None
    )
    layers = []
    for path, group in groups.items():
        parts = {
            name: group[key]
            for name, attribute in _PROJECTIONS.items()
            for key in (attribute, f"_{attribute}")
            if key in group
        }
        if len(parts) < 4:
            continue
        config = configs.get(path)
        own = group["vars"].attrs.get("name") if "vars" in group else None
        name = own or (config or {}).get("name") or path.rpartition("/")[2]
        params = {part: _weights(projection) for part, projection in parts.items()}
        if config is None:
            same = [c for c in configs.values() if c.get("name") == own]
            config = same[0] if len(same) == 1 else None
        layers.append(Stored(name, path, config, params))
    return layers


def _weights(projection: Any) -> dict[str, np.ndarray]:
    stored = projection.get("vars", {})
    return {
        part: _array(stored[key]) for part, key in (("kernel", "0"), ("bias", "1")) if key in stored
    }


def _array(dataset: Any) -> np.ndarray:
    value = dataset[()]
    return value.view(bfloat16) if dataset.attrs.get("dtype") == "bfloat16" else value
