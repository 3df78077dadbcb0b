"""Attention layers in the files that Keras 3 saves: `.keras`, a zip of JSON and HDF5, `.weights.h5`, and
the shards that a `.weights.json` lists.

HDF5 holds a group a layer, found here by what is in it: a group each for the query, key, value and output
projection, with their kernel and bias as `vars/0` and `vars/1`. Its place follows the attributes of the
model: `layers/<class>_<count>` in functional and sequential models. JSON nests the same way, which is how
a group finds its configuration; files since Keras 3.10 or so also name every group.

HDF5 can refer to other files: by links, by external storage and by virtual datasets. None is followed.
"""

import contextlib
import io
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from mha_jax.errors import WeightsError
from mha_jax.files import Budget, DamageError, parse_json, reading, zip_parts
from mha_jax.rooms import packages

_PROJECTIONS = {
    "query": "query_dense",
    "key": "key_dense",
    "value": "value_dense",
    "gate": "gate_dense",
    "attention_output": "output_dense",
}
_EXPECTED = (
    "Expected a .keras, .weights.h5 or .weights.json file, written by model.save or model.save_weights, "
    "whole. Copy it or save it again."
)
# Characters of a place: groups in groups without end would have places without end.
_LONGEST = 1024
# Those that come with HDF5: deflate, shuffle, fletcher32. Others are libraries that it would load.
_FILTERS = {1, 2, 3}
_CLASSES = ("MultiHeadAttention", "GroupQueryAttention", "GroupedQueryAttention")


class Stored(NamedTuple):
    """One attention layer of a file; `config` is None where the file has none of it.

    `foreign` is the name of its class where the file says that it is not Keras's.
    """

    name: str
    path: str
    foreign: str | None
    config: dict[str, Any] | None
    params: dict[str, dict[str, np.ndarray]]


class _Tree(NamedTuple):
    """What is in one HDF5 file, or in several shards of one, by place."""

    groups: set[str]
    names: dict[str, str]
    datasets: dict[str, Any]


def read(path: str | os.PathLike[str]) -> list[Stored]:
    """Return every attention layer of a file.

    Raises:
      WeightsError: It is no file of Keras's, or damaged, or refers to other files.
      MissingPackageError: h5py is not installed.

    Cost: A `.keras` file is held in memory once while it is read.
    """
    path = pathlib.Path(path)
    with packages():
        import h5py  # noqa: F401
    with path.open("rb") as file, reading(str(path), _EXPECTED, WeightsError):
        start = file.read(8)
        file.seek(0)
        if start.startswith(b"PK"):
            parts = zip_parts(file, ("config.json", "model.weights.h5"))
            nodes = _nodes(parse_json(parts["config.json"]))
            packed = file.seek(0, io.SEEK_END)
            return _read_hdf5([io.BytesIO(parts["model.weights.h5"])], nodes, packed)
        if start == b"\x89HDF\r\n\x1a\n":
            return _read_hdf5([file], {})
        if start.startswith(b"{"):
            return _read_shards(path.parent, parse_json(file.read()))
    raise WeightsError(
        f"{path} is not a file that Keras saved: it starts with {start!r}. Expected a .keras, .weights.h5 or "
        ".weights.json file, written by model.save or model.save_weights."
    )


def choose(layers: list[Stored], path: str, name: str | None) -> Stored:
    """Return the layer of a name or place, or the only one.

    Raises:
      WeightsError: If it is not there, not the only one, or of a class that is not Keras's.
    """
    if not layers:
        raise WeightsError(
            f"{path} holds no attention layer: expected groups with query, key, value and output kernels, "
            "as Keras 3 writes MultiHeadAttention and GroupQueryAttention. Of weights in several shards, "
            "load the .weights.json; save models in the old .h5 format again with Keras 3."
        )
    found = [layer for layer in layers if name is None or name in (layer.name, layer.path)]
    if len(found) == 1 and found[0].foreign is None:
        return found[0]
    if len(found) == 1:
        raise WeightsError(
            f"the layer {found[0].name!r} in {path} is of the class {found[0].foreign!r}, of which the file "
            "does not say what it computes: expected a MultiHeadAttention or GroupQueryAttention of Keras's. "
            "Load the model with Keras and pass model.get_layer(name) to import_layer, which tells; or, if "
            "it computes the same, load the file of model.save_weights and set its arguments with clone."
        )
    listed = ", ".join(f"{layer.name!r} at {layer.path!r}" for layer in layers)
    if name is None:
        problem, fix = "more than one attention layer", "Pass the name of one."
    elif found:
        problem, fix = (
            f"{len(found)} attention layers named {name!r}",
            "Pass the place of one as name.",
        )
    else:
        problem, fix = f"no attention layer named {name!r}", "Pass the name of one of these."
    raise WeightsError(f"{path} holds {problem}: {listed}. {fix}")


def _read_shards(folder: pathlib.Path, index: dict[str, Any]) -> list[Stored]:
    """Read the shards that a `.weights.json` lists, which lie beside it."""
    shards = {name for listed in index["weight_map"].values() for name in listed}
    for name in sorted(shards):
        if not re.fullmatch(r"[^/\\:]+\.weights\.h5", name) or (folder / name).is_symlink():
            raise DamageError(f"it lists {name!r}, which is no .weights.h5 file beside it")
    with contextlib.ExitStack() as stack:
        return _read_hdf5(
            [stack.enter_context((folder / name).open("rb")) for name in sorted(shards)], {}
        )


def _read_hdf5(
    streams: list[BinaryIO] | list[io.BytesIO],
    nodes: dict[str, Any],
    packed: int | None = None,
) -> list[Stored]:
    """Read the layers of one file, which may have been unpacked from fewer bytes, or of the shards of one."""
    import h5py

    size = sum(stream.seek(0, io.SEEK_END) for stream in streams)
    tree = _Tree(set(), {}, {})
    with contextlib.ExitStack() as stack:
        for stream in streams:
            _check_heaps(stream)
            _explore(stack.enter_context(h5py.File(stream, "r")), tree)
        return _layers(tree, nodes, Budget(size, packed))


def _check_heaps(stream: BinaryIO | io.BytesIO) -> None:
    """Refuse heaps of text with sizes that are wrong: HDF5 would walk round in them for ever."""
    for begin in _find(stream, b"GCOL\x01\x00\x00\x00"):
        stream.seek(begin + 8)
        end, place = begin + int.from_bytes(stream.read(8), "little"), begin + 16
        while place + 16 <= end:
            stream.seek(place)
            head = stream.read(16)
            index, size = int.from_bytes(head[:2], "little"), int.from_bytes(head[8:], "little")
            step = 16 + (size + 7) // 8 * 8 if index else size
            if len(head) < 16 or place + step > end or (not index and place + size != end):
                raise DamageError(f"the heap of text at byte {begin} has sizes that are wrong")
            place += step


def _find(stream: BinaryIO | io.BytesIO, mark: bytes) -> Iterator[int]:
    """Yield the places of a mark."""
    begin, kept = stream.seek(0), b""
    while block := stream.read(1 << 20):
        block = kept + block
        place = block.find(mark)
        while place >= 0:
            yield begin + place
            place = block.find(mark, place + 1)
        kept = block[1 - len(mark) :]
        begin += len(block) - len(kept)
        stream.seek(begin + len(kept))


def _explore(file: Any, tree: _Tree) -> None:
    """Add what is in an HDF5 file to the tree; a group or dataset with two names has the first."""
    import h5py
    from h5py import h5o  # type: ignore[attr-defined]

    seen, waiting = set(), [("", file)]
    while waiting:
        place, item = waiting.pop()
        address = h5o.get_info(item.id).addr
        if address in seen:
            continue
        seen.add(address)
        if isinstance(item, h5py.Dataset):
            tree.datasets.setdefault(place, item)
            continue
        tree.groups.add(place)
        if place.rpartition("/")[2] == "vars" and "name" in item.attrs:
            tree.names[place] = _text(item.attrs)
        for name in item:
            link, at = item.get(name, getlink=True), f"{place}/{name}".lstrip("/")
            if not isinstance(link, h5py.HardLink):
                raise DamageError(
                    f"it has a {type(link).__name__} at {at!r}, which may lead to another file. "
                    "Nothing of it was read"
                )
            child = item[name]
            if not isinstance(child, (h5py.Group, h5py.Dataset)):
                raise DamageError(f"it has a {type(child).__name__} at {at!r}")
            if len(at) > _LONGEST:
                raise DamageError(f"it has groups in groups, {at[:40]!r} and so on, too deep")
            waiting.append((at, child))


def _text(attributes: Any) -> str:
    attribute = attributes.get_id("name")
    if attribute.shape != () or attribute.dtype.kind not in "OS":
        raise DamageError("a name is no text")
    return str(attributes["name"])


def _nodes(node: Any, path: str = "") -> dict[str, dict[str, Any]]:
    """Return class and configuration of every object, by its place among the weights."""
    if not isinstance(node, dict) or not isinstance(config := node.get("config"), dict):
        return {}
    found = {path: node}
    if _is_attention(node):
        return found
    for attribute, value in config.items():
        place = f"{path}/{attribute}".removeprefix("/")
        if isinstance(value, list):
            counts: dict[str, int] = {}
            for child in value:
                name = _group_name(child)
                count = counts[name] = counts.get(name, -1) + 1
                found |= _nodes(child, f"{place}/{name}_{count}" if count else f"{place}/{name}")
        else:
            found |= _nodes(value, place)
    return found


def _is_attention(node: dict[str, Any]) -> bool:
    """Return whether an object is of one of Keras's classes: those of users have a registered name."""
    return node.get("class_name") in _CLASSES and not node.get("registered_name")


def _group_name(node: Any) -> str:
    """Return the name of a layer's group: its class in snake case."""
    name = str(node.get("class_name")) if isinstance(node, dict) else ""
    name = name.replace("GroupQueryAttention", "GroupedQueryAttention")
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _layers(tree: _Tree, nodes: dict[str, dict[str, Any]], budget: Budget) -> list[Stored]:
    layers = []
    configs = {place: node["config"] for place, node in nodes.items() if _is_attention(node)}
    for place in sorted(tree.groups):
        inside = f"{place}/".lstrip("/")
        parts = {
            name: f"{inside}{prefix}{attribute}"
            for name, attribute in _PROJECTIONS.items()
            for prefix in ("", "_")
            if f"{inside}{prefix}{attribute}" in tree.groups
        }
        if len(parts) < 4:
            continue
        config = configs.get(place)
        own = tree.names.get(f"{inside}vars")
        name = own or (config or {}).get("name") or place.rpartition("/")[2]
        params = {part: _weights(tree, projection, budget) for part, projection in parts.items()}
        if config is None:
            same = [c for c in configs.values() if c.get("name") == own]
            config = same[0] if len(same) == 1 else None
        other = place in nodes and place not in configs
        foreign = str(nodes[place].get("class_name")) if other else None
        layers.append(Stored(name, place, foreign, config, params))
    return layers


def _weights(tree: _Tree, projection: str, budget: Budget) -> dict[str, np.ndarray]:
    if f"{projection}/vars/2" in tree.datasets:
        raise WeightsError(
            f"{projection} holds more than a kernel and a bias: the layer was quantized (int8, int4 or "
            "float8) or changed otherwise. Save the layer before quantizing it."
        )
    return {
        part: _array(place, tree.datasets[place], budget)
        for part, place in (("kernel", f"{projection}/vars/0"), ("bias", f"{projection}/vars/1"))
        if place in tree.datasets
    }


def _array(place: str, dataset: Any, budget: Budget) -> np.ndarray:
    """Read numbers that lie in the file itself, as many as it has."""
    import h5py

    properties = dataset.id.get_create_plist()
    elsewhere = properties.get_external_count() or properties.get_layout() == h5py.h5d.VIRTUAL
    if (
        elsewhere
        or dataset.dtype.kind not in "biufV"
        or dataset.dtype.names
        or dataset.shape is None
    ):
        where = "in another file. Nothing of it was read" if elsewhere else "not as numbers"
        raise DamageError(f"{place!r} is stored {where}")
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if filters - _FILTERS or (
        dataset.chunks and np.prod(dataset.chunks, dtype=float) > dataset.size
    ):
        raise DamageError(
            f"{place!r} is stored in pieces, or by filters {sorted(filters)}, of its own"
        )
    budget.take(repr(place), dataset.nbytes, dataset.id.get_storage_size(), bool(filters))
    value = dataset[()]
    return value.view(bfloat16) if dataset.attrs.get("dtype") == "bfloat16" else value
