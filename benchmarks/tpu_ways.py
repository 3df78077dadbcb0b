"""The pieces of attention that are weighed and timed on TPUs, and every way to do them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax import Call, Causal, Dropout, Full, Window
from mha_jax.attention.biases import Buckets
from mha_jax.attention.call import Output, State
from mha_jax.attention.check import check
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.pallas_tpu.patterns import Order, entry, order
from mha_jax.backends.pallas_tpu.sizes import SIZES
from mha_jax.engine.run import run

# Topology, and bf16 multiply-adds of one core in a cycle, times two.
KINDS = {
    "v4": ("v4:2x2x1", 131_072),
    "v5e": ("v5e:2x2", 131_072),
    "v5p": ("v5p:2x2x1", 131_072),
    "v6e": ("v6e:2x2", 524_288),
    "tpu7x": ("tpu7x:2x2x1", 524_288),
}
MASKS = {"full": Full(), "causal": Causal(), "window": Window(1023, 0)}
SPLASH = [(1024, 1024, 512), (512, 2048, 512), (1024, 2048, 1024), (1024, 2048, 256)]
FLASH = (512, 1024, 512)


@dataclasses.dataclass(frozen=True)
class Work:
    """One piece of attention: B 1, N 1, bfloat16."""

    backward: bool = False
    length: int = 4096
    size: int = 128
    mask: str = "full"
    rate: float = 0.0
    buckets: bool = False  # T5's bias by rule, 32 buckets
    cap: float | None = None

    @property
    def flops(self) -> float:
        """Useful arithmetic of what is weighed: two products forward, five backward, of the visible pairs."""
        rows, columns = np.arange(self.length)[:, None], np.arange(self.length)[None]
        pairs = {
            "full": self.length**2,
            "causal": int((columns <= rows).sum()),
            "window": int(((columns <= rows) & (columns > rows - 1024)).sum()),
        }[self.mask]
        return (5 if self.backward else 2) * 2.0 * pairs * self.size

    @property
    def timed_flops(self) -> float:
        """Those of what is timed: a gradient with its forward pass."""
        return self.flops * (7 / 5 if self.backward else 1)


def _works() -> dict[str, Work]:
    works = {}
    for backward, size in ((False, 128), (False, 64), (True, 128), (True, 64)):
        for mask, length in (("full", 4096), ("causal", 4096), ("window", 4096), ("causal", 16384)):
            name = f"{'backward' if backward else 'forward'}_{size}_{mask}_{length}"
            works[name] = Work(backward, length, size, mask)
    works["forward_128_full_16384"] = Work(length=16384)
    works["forward_128_dropout_4096"] = Work(rate=0.1)
    works["backward_128_dropout_4096"] = Work(True, rate=0.1)
    for backward in (False, True):
        way = "backward" if backward else "forward"
        works[f"{way}_128_buckets_4096"] = Work(backward, buckets=True)
        works[f"{way}_128_buckets_causal_4096"] = Work(backward, mask="causal", buckets=True)
        works[f"{way}_128_cap_4096"] = Work(backward, cap=30.0)
    return works


WORKS = _works()


@dataclasses.dataclass(frozen=True)
class Rival:
    """A way to do the work: what to compile, and how its schedule is weighed.

    `reads` maps a kernel's name to what `Schedule.issued` is given; kernels that it does not know, for
    which it returns None, are XLA's and counted as listed. `timed` is what a clock is given where that is
    more than what is weighed: a gradient with the forward pass that it needs, as the others' are.
    """

    function: Callable
    arguments: tuple
    reads: Callable[[str], tuple | None]
    timed: tuple[Callable, tuple] | None = None


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _gradient_of(function: Callable, backward: bool) -> Callable:
    if not backward:
        return function
    return lambda d_out, *arrays: jax.vjp(function, *arrays)[1](d_out)


def ours(work: Work, kind: str, interpret: bool = False) -> Rival:
    """Return our own way to do the work with the tiles of a kind of chip."""
    backend, x = PallasTPU(SIZES[kind], interpret), _array(1, work.length, 1, work.size)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def call(q, k, v, words):
        dropout = Dropout(words, work.rate) if work.rate else None
        bias = Buckets(jnp.zeros((32, 1))) if work.buckets else None
        return check(Call(q, k, v, None, None, MASKS[work.mask], bias, dropout, logit_cap=work.cap))

    def forward(q, k, v, words):
        return backend.forward(call(q, k, v, words)).out

    def backward(q, k, v, words, d_out, out, statistic):
        cotangent = Output(d_out, jnp.zeros_like(statistic))
        state = State(out, statistic, statistic)
        return backend.cotangent(call(q, k, v, words), state, cotangent)[:3]

    zeros = jnp.zeros(x.shape, x.dtype)
    plain = call(zeros, zeros, zeros, jnp.zeros(2, jnp.uint32))
    g = SIZES[kind].lay(plain, "k" if work.backward else "q")
    trips = _mean_trips(order(plain, g), g)
    arguments = (x, x, x, words)
    if work.backward:
        arguments += (x, x, jax.ShapeDtypeStruct((1, 1, work.length), jnp.float32))
    function = backward if work.backward else forward
    read = trips, 1.0, g.steps * g.chunks > 1

    def gradient(q, k, v, words, d_out):
        def out(q, k, v):
            return run(call(q, k, v, words), backend).out

        return jax.vjp(out, q, k, v)[1](d_out)

    return Rival(
        function,
        arguments,
        lambda kernel: read if "attention_" in kernel else None,
        (gradient, arguments[:5]) if work.backward else None,
    )


def _mean_trips(tiles: Order, g: Any) -> tuple[float, ...]:
    """Return how often each loop over tiles runs for a block of rows, on average, where that differs."""
    if tiles.fixed is not None:
        return ()
    lists = np.asarray(tiles.table).reshape(-1, entry(g, tiles.shapes))
    means = lists[:, : len(tiles.shapes)].mean(0)
    return tuple(float(mean) for mean, count in zip(means, tiles.counts) if count is None)


def _live_share(work: Work, block_q: int, block_k: int) -> float:
    """Return the share of a grid's steps that are not empty."""
    first = np.arange(0, work.length, block_q)[:, None]
    column = np.arange(0, work.length, block_k)[None]
    live = np.ones((first.size, column.size), bool)
    if work.mask != "full":
        live = column <= first + block_q - 1
    if work.mask == "window":
        live &= column + block_k - 1 > first - 1024
    if work.mask == "window":  # splash's grid is as wide as its widest row of blocks
        return float(live.sum() / (live.shape[0] * live.sum(1).max()))
    return float(live.mean())


def _flash(work: Work) -> Rival:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q, major, k = FLASH
    blocks = flash.BlockSizes(
        **{"block_b": 1, "block_q": q, "block_k_major": major, "block_k": k},
        **{"block_q_major_dkv": q, "block_k_major_dkv": major, "block_k_dkv": k, "block_q_dkv": q},
        **{"block_k_major_dq": major, "block_k_dq": k, "block_q_dq": q},
    )
    function = functools.partial(
        flash.flash_attention,
        causal=work.mask == "causal",
        sm_scale=work.size**-0.5,
        block_sizes=blocks,
    )
    x = _array(1, 1, work.length, work.size)
    share = _live_share(work, q, major)
    arguments = (x,) * (4 if work.backward else 3)
    return Rival(
        _gradient_of(function, work.backward),
        arguments,
        lambda n: ((), share) if "flash" in n else None,
    )


def _splash(work: Work, sizes: tuple[int, int, int]) -> Rival:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (work.length, work.length)
    mask = {
        "full": lambda: masks.FullMask(shape),
        "causal": lambda: masks.CausalMask(shape),
        "window": lambda: masks.LocalMask(shape, (1023, 0), 0),
    }[work.mask]()
    q, kv, compute = sizes
    blocks = kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    attend = kernel.make_splash_mha_single_device(masks.MultiHeadMask([mask]), block_sizes=blocks)
    x = _array(1, work.length, work.size)
    arguments = (x,) * (4 if work.backward else 3)
    share = _live_share(work, q, kv)
    return Rival(
        _gradient_of(lambda *qkv: attend(*qkv), work.backward),
        arguments,
        lambda name: ((), share) if "splash" in name else None,
    )


def _dense(work: Work) -> Rival:
    def attend(q, k, v):
        x = jnp.einsum("th,sh->ts", q, k, preferred_element_type=jnp.float32) * work.size**-0.5
        if work.mask != "full":
            ahead = jnp.arange(work.length)[None] - jnp.arange(work.length)[:, None]
            seen = (ahead <= 0) & (ahead > (-1024 if work.mask == "window" else -work.length))
            x = jnp.where(seen, x, -1e30)
        return jax.nn.softmax(x, -1).astype(q.dtype) @ v

    x = _array(work.length, work.size)
    arguments = (x,) * (4 if work.backward else 3)
    return Rival(_gradient_of(attend, work.backward), arguments, lambda name: None)


def rivals(work: Work, kind: str) -> dict[str, Callable[[], Rival]]:
    """Return every way to do the work: what can run it, made when asked for."""
    ways: dict[str, Callable[[], Rival]] = {"mha_jax": lambda: ours(work, kind)}
    if work.rate:
        return ways
    if work.mask != "window":
        ways[f"flash {'/'.join(map(str, FLASH))}"] = lambda: _flash(work)
    for sizes in SPLASH:
        name = f"splash {'/'.join(map(str, sizes))}"
        ways[name] = functools.partial(_splash, work, sizes)
    if work.length <= 4096:
        ways["xla"] = lambda: _dense(work)
    return ways
