"""Pieces of attention on NVIDIA GPUs, and the ways to do them: ours, and those of jax and tokamax."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_cards
from mha_jax import Call, Causal, Dropout, Full, Tokens, ValidKeys, Window, attend
from mha_jax.attention.call import Output
from mha_jax.attention.check import check
from mha_jax.backends.mosaic_gpu import MosaicGPU

MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(1023, 0),
    "padding": ValidKeys(),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """One piece of attention; 16,384 tokens and 16 heads if nothing else is said.

    Args:
      backward: The gradients of q, k and v, with the forward pass that they rest on.
      extra: "dropout" or "bias", beside the mask.
    """

    backward: bool = False
    length: int = 4096
    size: int = 128
    mask: str = "full"
    extra: str = ""
    dtype: Any = jnp.bfloat16
    heads: int = 16

    @property
    def batch(self) -> int:
        return max(1, 16384 // self.length)

    @property
    def flops(self) -> float:
        """Useful arithmetic: two products forward, five backward, of the visible pairs."""
        rows, columns = np.arange(self.length)[:, None], np.arange(self.length)[None]
        seen = np.ones((1, 1), bool)
        if self.mask in ("causal", "window"):
            seen = columns <= rows
        if self.mask == "window":
            seen = seen & (columns > rows - 1024)
        pairs = np.broadcast_to(seen, (self.length, self.length)).sum()
        return (7 if self.backward else 2) * 2.0 * pairs * self.size * self.batch * self.heads

    @property
    def arguments(self) -> tuple:
        """Shapes of q, k, v, the cotangent of the output, valid keys, a bias and a key's words."""
        x = jax.ShapeDtypeStruct((self.batch, self.length, self.heads, self.size), self.dtype)
        pairs = (1, self.heads, self.length, self.length) if self.extra == "bias" else (1,) * 4
        return (
            *(x, x, x, x),
            jax.ShapeDtypeStruct((self.batch, self.length), jnp.bool_),
            jax.ShapeDtypeStruct(pairs, self.dtype),
            jax.ShapeDtypeStruct((2,), jnp.uint32),
        )


def _works() -> dict[str, Work]:
    works = {}
    for backward in (False, True):
        start = "backward" if backward else "forward"
        for size in (64, 128, 256):
            for mask in ("full", "causal"):
                works[f"{start}_{size}_{mask}_4096"] = Work(backward, size=size, mask=mask)
        works[f"{start}_128_causal_1024"] = Work(backward, 1024, mask="causal")
        works[f"{start}_128_causal_16384"] = Work(backward, 16384, mask="causal")
        works[f"{start}_128_window_4096"] = Work(backward, mask="window")
        works[f"{start}_128_padding_4096"] = Work(backward, mask="padding")
        for extra in ("dropout", "bias"):
            works[f"{start}_128_{extra}_4096"] = Work(backward, mask="causal", extra=extra)
        works[f"{start}_128_float32_4096"] = Work(backward, mask="causal", dtype=jnp.float32)
    return works


WORKS = _works()


# What a way takes: `Work.arguments`.
Way = Callable[..., Any]


def ways(work: Work, card: str | None = None) -> dict[str, Way]:
    """Return the ways to do a work, functions of `work.arguments`.

    Args:
      card: Of `gpu_cards.CARDS`, which is not there; None: the GPU of this process, which jax.nn and tokamax
        ask for its kind while they are traced.
    """
    here, half = card is None, work.dtype != jnp.float32
    hopper = card is None or gpu_cards.CARDS[card].capability == (9, 0)
    new = jax.__version_info__ >= (0, 11)
    found = {"mha_jax": _passes(_ours(work), work.backward)}
    if not work.extra and half:
        found["mha_jax blockwise"] = _passes(_ours(work, "blockwise"), work.backward)
    if half and hopper and new:
        found["mha_jax mosaic_gpu"] = _our_kernels(work)
    others: dict[str, Way] = {}
    if work.extra != "dropout":
        if here and half:
            others["jax.nn cudnn"] = _jax_nn(work, "cudnn")
        if work.length <= 4096:
            others["jax.nn xla"] = _jax_nn(work, "xla")
        if importlib.util.find_spec("tokamax") is not None:
            others["tokamax xla_chunked"] = _tokamax(work, "xla_chunked")
            if here and half:
                others["tokamax mosaic_gpu"] = _tokamax(work, "mosaic_gpu")
    # It has no backward pass with a mask.
    masks = ("full",) if work.backward else ("full", "causal")
    if half and hopper and new and not work.extra and work.mask in masks:
        others["jax mosaic_gpu, f16"] = _jax_kernels(work, here)
    return found | {name: _passes(way, work.backward) for name, way in others.items()}


def _call(work: Work, q: Any, k: Any, v: Any, valid: Any, bias: Any, words: Any) -> Call:
    return Call(
        *(q, k, v),
        mask=MASKS[work.mask],
        k_tokens=Tokens(work.length, valid=valid) if work.mask == "padding" else None,
        bias=bias if work.extra == "bias" else None,
        dropout=Dropout(words, 0.1) if work.extra == "dropout" else None,
    )


def _ours(work: Work, backend: Any = None) -> Way:
    return lambda *arguments: attend(_call(work, *arguments), backend).out


def _our_kernels(work: Work) -> Way:
    """Return the passes of the kernels that are run by name alone, as they are called on a GPU."""
    backend = MosaicGPU()

    def run(q, k, v, d_out, *rest):
        problem = check(_call(work, q, k, v, *rest))
        state = backend.forward(problem)
        if not work.backward:
            return state.out
        moves = backend.cotangent(problem, state, Output(d_out, jnp.zeros_like(state.m)))
        return moves.q, moves.k, moves.v

    return run


def _options(work: Work, valid: Any, bias: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"is_causal": work.mask in ("causal", "window")}
    if work.mask == "window":
        options["local_window_size"] = (1023, 0)
    if work.mask == "padding":
        options["key_value_seq_lengths"] = valid.sum(-1, dtype=jnp.int32)
    if work.extra == "bias":
        options["bias"] = bias
    return options


def _jax_nn(work: Work, implementation: Literal["xla", "cudnn"]) -> Way:
    def attention(q, k, v, valid, bias, words):
        options = _options(work, valid, bias)
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)

    return attention


def _tokamax(work: Work, implementation: Any) -> Way:
    import tokamax

    def attention(q, k, v, valid, bias, words):
        options = _options(work, valid, bias)
        return tokamax.dot_product_attention(q, k, v, implementation=implementation, **options)

    return attention


def _jax_kernels(work: Work, here: bool) -> Way:
    """Return jax's example of a Mosaic GPU kernel, which takes float16 alone."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    blocks = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
    tuning = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=128 if work.size <= 128 else 64,
        max_concurrent_steps=2,
        causal=work.mask == "causal",
        **blocks if work.backward else {},
    )
    # It asks the process for the version of CUDA: that of the compiler.
    runtime = mock.Mock(cuda_runtime_get_version=lambda: 12091)

    def attention(q, k, v, *rest):
        q, k, v = (x.astype(jnp.float16) for x in (q, k, v))
        if here:
            out = attention_mgpu.attention(q, k, v, tuning)
        else:
            with mock.patch.object(attention_mgpu, "cuda_versions", runtime):
                out = attention_mgpu.attention(q, k, v, tuning)
        return jnp.asarray(out).astype(work.dtype)

    return attention


def _passes(way: Callable, backward: bool) -> Callable:
    if not backward:
        return lambda q, k, v, d_out, *rest: way(q, k, v, *rest)

    def gradients(q, k, v, d_out, *rest):
        return jax.vjp(lambda *a: way(*a, *rest), q, k, v)[1](d_out)

    return gradients
