"""PyTorch's fused attention on the same pieces, where PyTorch sees a GPU."""

import importlib.util
from typing import Any

import numpy as np

from benchmarks.gpu_ways import Work
from benchmarks.timer import sample


def missing() -> str | None:
    """Say what is not there, or return None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def seconds(work: Work, device: str, rounds: int = 5, at_least: float = 0.1) -> list[float]:
    """Return the seconds of one call in each round; the first call is not counted."""
    import torch

    call = attention(work, device)

    def run(count):
        for _ in range(count):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    run(1)
    calls = 1
    while 0 < sample(run, calls).wall * calls < at_least and calls < 2**14:
        calls *= 2
    return [sample(run, calls).wall for _ in range(rounds)]


def attention(work: Work, device: str) -> Any:
    """Return a function of nothing that does a work, heads first, and returns what it computes."""
    import torch

    dtype = getattr(torch, np.dtype(work.dtype).name)
    shape = (work.batch, work.heads, work.length, work.size)
    q, k, v, d_out = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    places = torch.arange(work.length, device=device)
    ahead = places[None] - places[:, None]
    mask = None
    if work.mask == "window":
        mask = (ahead <= 0) & (ahead > -1024)
    elif work.mask == "padding":
        mask = torch.ones((work.batch, 1, 1, work.length), dtype=torch.bool, device=device)
    if work.extra == "bias":
        bias = torch.zeros((1, *shape[1:3], work.length), dtype=dtype, device=device)
        mask = bias.masked_fill(ahead > 0, -torch.inf) if work.mask == "causal" else bias
    options: dict[str, Any] = {
        "attn_mask": mask,
        "dropout_p": 0.1 if work.extra == "dropout" else 0.0,
        "is_causal": work.mask == "causal" and mask is None,
    }
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    if not work.backward:
        return lambda: attend(q, k, v, **options)
    arrays = [x.requires_grad_() for x in (q, k, v)]

    def gradients():
        return torch.autograd.grad(attend(*arrays, **options), arrays, d_out)

    return gradients
