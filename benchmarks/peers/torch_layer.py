"""PyTorch, eagerly, on the CPU: its fused function and its own layer."""

from typing import Any, ClassVar

import jax
import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.peers.base import Peer, sides
from benchmarks.rows import Data, Row
from benchmarks.runs import Numbers, Run


class TorchPeer(Peer):
    """What both ways share. Masks are made before the clock starts."""

    framework = "torch"
    packages = ("torch",)

    def cannot(self, row):
        if jax.default_backend() != "cpu":
            return f"runs on the CPU here, beside jax on {jax.default_backend()}"
        return super().cannot(row)

    def run(self, row, data):
        return TorchRun(self, row, data)

    def module(self, row: Row, data: Data) -> torch.nn.Module:
        """Return a module that maps the inputs to the output."""
        raise NotImplementedError

    def inputs(self, row: Row, data: Data) -> dict[str, torch.Tensor]:
        """Return the inputs as leaves in the row's dtype, in the layout that torch likes."""
        dtype = getattr(torch, row.dtype)
        heads_first = row.level == "function"
        return {
            name: torch.tensor(np.swapaxes(x, 1, 2).copy() if heads_first else x, dtype=dtype)
            for name, x in data.inputs.items()
        }


class TorchRun(Run):
    """A torch module on its inputs, eagerly."""

    def __init__(self, peer: TorchPeer, row: Row, data: Data):
        self.row = row
        self.module = peer.module(row, data)
        self.inputs = peer.inputs(row, data)
        if row.backward:
            for x in self.inputs.values():
                x.requires_grad_()
            cotangent = data.cotangent
            if row.level == "function":
                cotangent = np.swapaxes(cotangent, 1, 2).copy()
            self.cotangent = torch.tensor(cotangent, dtype=getattr(torch, row.dtype))
            self.leaves = [*self.inputs.values(), *self.module.parameters()]

    def call(self) -> Any:
        if not self.row.backward:
            with torch.no_grad():
                return self.module(self.inputs)
        out = self.module(self.inputs)
        return out, torch.autograd.grad(out, self.leaves, self.cotangent)

    def numbers(self, result: Any) -> Numbers:
        def array(x):
            x = x.detach().float().numpy()
            return np.swapaxes(x, 1, 2) if self.row.level == "function" else x

        if not self.row.backward:
            return {"out": array(result)}
        out, gradients = result
        named = {f"d_{name}": array(g) for name, g in zip(self.inputs, gradients)}
        return {"out": array(out), **named}


class Attention(torch.nn.Module):
    """`scaled_dot_product_attention`, alone or between four products, q, k and v fused."""

    def __init__(self, row: Row, data: Data):
        super().__init__()
        self.row = row
        self.mask = _mask(row, data)
        if row.level == "layer":
            names = ("query", "key", "value")
            kernels = [data.weights[n]["kernel"].reshape(row.width, -1).T for n in names]
            biases = [data.weights[n]["bias"].reshape(-1) for n in names]
            last = data.weights["attention_output"]
            self.projection = _linear(np.concatenate(kernels), np.concatenate(biases), row)
            self.output = _linear(last["kernel"].reshape(-1, row.width).T, last["bias"], row)

    def attend(self, q, k, v):
        row = self.row
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self.mask,
            dropout_p=row.dropout,
            is_causal=row.causal and self.mask is None,
            enable_gqa=row.key_heads != row.heads,
        )

    def forward(self, inputs):
        if self.row.level == "function":
            return self.attend(inputs["query"], inputs["key"], inputs["value"])
        q, k, v = (self.heads(x) for x in self.project(*sides(inputs)))
        out = self.attend(q, k, v).transpose(1, 2)
        return self.output(out.reshape(*out.shape[:2], -1))

    def heads(self, x):
        return x.view(*x.shape[:2], -1, self.row.size).transpose(1, 2)

    def project(self, query, value):
        row = self.row
        sizes = [row.width, row.key_heads * row.size, row.key_heads * row.size]
        if query is value:
            return self.projection(query).split(sizes, -1)
        weight, bias = self.projection.weight, self.projection.bias
        q = F.linear(query, weight[: row.width], bias[: row.width])
        kv = F.linear(value, weight[row.width :], bias[row.width :])
        return q, *kv.split(sizes[1:], -1)


class Fused(TorchPeer):
    """The function; as a layer, four products around it, as one writes it by hand."""

    name = "torch sdpa"
    lacks: ClassVar[dict[str, str]] = {"N-D axes": "no attention axes"}

    def module(self, row, data):
        return Attention(row, data)


class OwnLayer(torch.nn.Module):
    """`torch.nn.MultiheadAttention` without weights returned."""

    def __init__(self, row: Row, data: Data):
        super().__init__()
        layer = torch.nn.MultiheadAttention(
            row.width, row.heads, row.dropout, batch_first=True, dtype=getattr(torch, row.dtype)
        )
        names = ("query", "key", "value")
        kernels = [data.weights[n]["kernel"].reshape(row.width, -1).T for n in names]
        last = data.weights["attention_output"]
        with torch.no_grad():
            layer.in_proj_weight.copy_(torch.tensor(np.concatenate(kernels)))
            layer.in_proj_bias.copy_(
                torch.tensor(np.concatenate([data.weights[n]["bias"].reshape(-1) for n in names]))
            )
            layer.out_proj.weight.copy_(torch.tensor(last["kernel"].reshape(-1, row.width).T))
            layer.out_proj.bias.copy_(torch.tensor(last["bias"]))
        self.layer = layer.train(row.dropout > 0)
        self.options: dict[str, Any] = {"need_weights": False}
        if row.padding:
            self.options["key_padding_mask"] = ~torch.tensor(data.masks["valid"])
        structure = _structure(row, data, padding=False)
        if row.causal:
            structure = np.tril(np.ones((row.length, row.key_length), bool)) & (
                True if structure is None else structure
            )
        if structure is not None:
            hidden = ~torch.tensor(structure)
            if hidden.ndim == 4:
                hidden = hidden.expand(row.batch, -1, -1, -1).flatten(0, 1)
            self.options["attn_mask"] = hidden
            self.options["is_causal"] = row.causal and row.window is None and not row.per_head

    def forward(self, inputs):
        query, value = sides(inputs)
        return self.layer(query, value, value, **self.options)[0]


class Layer(TorchPeer):
    """torch's own layer."""

    name = "torch mha"
    lacks: ClassVar[dict[str, str]] = {
        "function": "is a layer only",
        "grouped heads": "no grouped heads",
        "N-D axes": "attends over one axis only",
    }

    def module(self, row, data):
        return OwnLayer(row, data)


def _linear(weight: np.ndarray, bias: np.ndarray, row: Row) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=getattr(torch, row.dtype))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def _structure(row: Row, data: Data, padding: bool = True) -> np.ndarray | None:
    """Return all masks but a lone causal one as one boolean array, or None."""
    t, s = np.arange(row.length)[:, None], np.arange(row.key_length)[None]
    parts = []
    if row.window is not None:
        parts.append((s <= t) & (s > t - row.window))
    if row.padding and padding:
        parts.append(data.masks["valid"][:, None, None, :])
    if row.per_head:
        parts.append(data.masks["heads"])
    if parts and row.causal and row.window is None:
        parts.append(s <= t)
    mask = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask


def _mask(row: Row, data: Data) -> torch.Tensor | None:
    mask = _structure(row, data)
    return None if mask is None else torch.tensor(mask)


PEERS = (Fused(), Layer())
