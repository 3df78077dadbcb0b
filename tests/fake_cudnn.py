"""What cuDNN's two calls mean, from their configuration alone, in plain JAX: for tests without a GPU."""

import json

import jax.numpy as jnp
import numpy as np


def ffi_call(target, results, *, legacy_backend_config, **_):
    """Stand for `jax.ffi.ffi_call`; rows that see nothing get NaN, for which cuDNN promises nothing."""
    fields = json.loads(legacy_backend_config)["cudnn_fmha_backend_config"]
    run = {"__cudnn$fmhaSoftmax": _forward, "__cudnn$fmhaSoftmaxBackward": _backward}[target]

    def call(*operands):
        found = [x.astype(like.dtype) for x, like in zip(run(fields, *operands), results)]
        assert [x.shape for x in found] == [x.shape for x in results[:-1]]
        assert {operands[0].shape[3] % 8, operands[2].shape[3] % 8} == {0}
        return [*found, jnp.zeros((0,), jnp.uint8)]

    return call


def _logits(fields, q, k, lengths):
    """Return float32 logits [B, N, T, S], -inf where hidden."""
    groups = q.shape[2] // k.shape[2]
    assert fields["intermediate_tensor_shape"]["dimensions"] == [
        str(x) for x in (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    ]
    x = jnp.einsum("btnh,bsnh->bnts", _wide(q), jnp.repeat(_wide(k), groups, 2))
    x = x * np.float32(fields["fmha_scale"])
    rows = np.arange(q.shape[1], dtype=np.int32)[None, None, :, None]
    columns = np.arange(k.shape[1], dtype=np.int32)[None, None, None]
    mask, window = fields["mask_type"], fields["sliding_window_length"]
    seen = jnp.ones((1, 1, *x.shape[2:]), bool)
    if "CAUSAL" in mask:
        seen &= columns <= rows
        if window:
            seen &= columns > rows - window
    assert ("PADDING" in mask) == bool(lengths)
    if lengths:
        q_length, k_length = (x[:, None, None, None] for x in lengths)
        seen = seen & (rows < q_length) & (columns < k_length)
    return jnp.where(seen, x, -jnp.inf)


def _wide(x):
    return x.astype(jnp.float32)


def _forward(fields, q, k, v, *lengths):
    x = _logits(fields, q, k, lengths)
    m = x.max(-1, keepdims=True)  # where it is -inf, all that follows is NaN
    p = jnp.exp(x - m)
    total = p.sum(-1, keepdims=True)
    values = jnp.repeat(_wide(v), q.shape[2] // v.shape[2], 2)
    return jnp.einsum("bnts,bsnv->bntv", p / total, values), (m + jnp.log(total))[..., 0]


def _backward(fields, q, k, v, lse, d_out, out, *lengths):
    x = _logits(fields, q, k, lengths)
    heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    values, keys = (jnp.repeat(_wide(x), groups, 2) for x in (v, k))
    p = jnp.exp(x - lse[..., None])
    dp = jnp.einsum("btnv,bsnv->bnts", _wide(d_out), values)
    delta = jnp.einsum("btnv,btnv->bnt", _wide(d_out), _wide(out))
    dx = p * (dp - delta[..., None]) * np.float32(fields["fmha_scale"])
    dq = jnp.einsum("bnts,bsnh->bnth", dx, keys)
    dq = jnp.where((x == -jnp.inf).all(-1, keepdims=True), jnp.nan, dq)

    def shared(x):
        return x.reshape(x.shape[0], heads // groups, groups, *x.shape[2:]).sum(2)

    dk = shared(jnp.einsum("bnts,btnh->bnsh", dx, _wide(q)))
    return dq, dk, shared(jnp.einsum("bnts,btnv->bnsv", p, _wide(d_out)))
