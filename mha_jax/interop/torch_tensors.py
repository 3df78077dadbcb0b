"""Tensors of torch as arrays of NumPy, and back: the same bits, bfloat16 included.

torch is imported for bfloat16 and to make tensors only.
(Type checkers take `torch` for the one of this folder: hence the ignores.)
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from mha_jax.errors import MhaError


def read(name: str, x: Any, error: type[MhaError]) -> np.ndarray:
    """Return a NumPy array, JAX array or torch tensor as NumPy.

    Args:
      name: Of the array, for errors.
      x: The array.
      error: The class to raise.

    Raises:
      MhaError: Of that class, if there are no numbers, or none that NumPy knows.
    """
    try:
        if not hasattr(x, "detach"):
            return np.asarray(x)
        if str(x.dtype) != "torch.bfloat16":
            return x.numpy(force=True)
        import torch  # type: ignore[import-not-found]

        x = x.detach().cpu().resolve_neg()
        return x.view(torch.int16).numpy().view(jnp.bfloat16)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError) as problem:
        parts = [part for part in ("dtype", "layout", "device") if hasattr(x, part)]
        found = [type(x).__name__, *(f"{part} {getattr(x, part)}" for part in parts)]
        raise error(
            f"{name} cannot be read: got {', '.join(found)} ({problem}). Expected an array, or a dense "
            "tensor of float64, float32, float16 or bfloat16 that is not quantized. Make a sparse one dense "
            "with x.to_dense(); on the device meta there are no numbers, load the weights first."
        ) from problem


def tensor(x: np.ndarray) -> Any:
    """Return a tensor with a copy of an array."""
    import torch  # type: ignore[import-not-found]

    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)  # type: ignore[attr-defined]
    return torch.from_numpy(x.copy())  # type: ignore[attr-defined]
