"""Attention in float64 NumPy, written from the formula; it imports nothing of the library.

q [B, T, N, H]   k [B, S, K, H]   v [B, S, K, V]   visible, bias, keep broadcast to [B, N, T, S]
"""

import numpy as np


def _heads(x, heads):
    """Repeat key-value heads so that query head n reads head n // G, heads first: [B, N, S, .]."""
    x = np.asarray(x, np.float64).transpose(0, 2, 1, 3)
    return np.repeat(x, heads // x.shape[1], axis=1)


def attention(q, k, v, visible=True, bias=None, keep=None, rate=0.0, scale=None, cap=None):
    """Return (out [B, T, N, V], lse [B, N, T], scores [B, N, T, S]) in float64."""
    heads = q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    qh, kh, vh = _heads(q, heads), _heads(k, heads), _heads(v, heads)
    x = scale * (qh @ kh.transpose(0, 1, 3, 2))
    if cap is not None:
        x = cap * np.tanh(x / cap)
    if bias is not None:
        x = x + np.asarray(bias, np.float64)
    x = np.where(visible, x, -np.inf)
    m = x.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(x - np.where(np.isinf(m), 0, m))
    total = p.sum(-1, keepdims=True)
    seen = total > 0
    scores = np.where(seen, p / np.where(seen, total, 1), 0)
    with np.errstate(divide="ignore"):
        lse = np.where(seen, np.where(seen, m, 0) + np.log(np.where(seen, total, 1)), -np.inf)
    kept = scores if keep is None else np.where(keep, scores / (1 - rate), 0)
    return (kept @ vh).transpose(0, 2, 1, 3), lse[..., 0], scores


def gradients(q, k, v, d_out, d_lse=None, **options):
    """Return the cotangents (dq, dk, dv, dlogits [B, N, T, S]) of `attention`, by hand.

    dlogits is the gradient of a dense bias.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    scale = options.get("scale") or q.shape[-1] ** -0.5
    keep, rate, cap = options.get("keep"), options.get("rate", 0.0), options.get("cap")
    _, _, p = attention(q, k, v, **options)
    qh, kh, vh = _heads(q, heads), _heads(k, heads), _heads(v, heads)
    do = np.asarray(d_out, np.float64).transpose(0, 2, 1, 3)
    kept = p if keep is None else np.where(keep, p / (1 - rate), 0)
    dv = kept.transpose(0, 1, 3, 2) @ do
    dp = do @ vh.transpose(0, 1, 3, 2)
    dp = dp if keep is None else np.where(keep, dp / (1 - rate), 0)
    dx = p * (dp - (p * dp).sum(-1, keepdims=True))
    if d_lse is not None:
        dx = dx + p * np.asarray(d_lse, np.float64)[..., None]
    slope = 1.0
    if cap is not None:
        slope = 1 - np.tanh(scale * (qh @ kh.transpose(0, 1, 3, 2)) / cap) ** 2
    dq = scale * (dx * slope) @ kh
    dk = scale * (dx * slope).transpose(0, 1, 3, 2) @ qh

    def shared(x):
        b, _, s, size = x.shape
        return x.reshape(b, kv_heads, heads // kv_heads, s, size).sum(2).transpose(0, 2, 1, 3)

    return dq.transpose(0, 2, 1, 3), shared(dk), shared(dv), dx


def layer(params, query, value, key=None, **options):
    """Return (output, scores) of the whole layer for inputs [B, T, D], [B, S, D], in float64."""
    key = value if key is None else key

    def project(name, x):
        y = np.einsum(
            "btd,dnh->btnh",
            np.asarray(x, np.float64),
            np.asarray(params[name]["kernel"], np.float64),
        )
        return y + np.asarray(params[name]["bias"], np.float64) if "bias" in params[name] else y

    out, _, scores = attention(
        project("query", query), project("key", key), project("value", value), **options
    )
    if "gate" in params:
        out = out / (1 + np.exp(-project("gate", query)))
    kernel = np.asarray(params["attention_output"]["kernel"], np.float64)
    out = np.tensordot(out, kernel, 2)
    if "bias" in params["attention_output"]:
        out = out + np.asarray(params["attention_output"]["bias"], np.float64)
    return out, scores


def assert_close(got, want, atol, what=""):
    """Raise unless shapes agree, infinities agree, and the largest error is at most `atol`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want), err_msg=f"{what}: infinities")
    finite = np.isfinite(want)
    error = np.abs(got[finite] - want[finite]).max(initial=0.0)
    assert error <= atol, f"{what}: largest error {error:.3g}, allowed {atol:.3g}"


def relative_error(got, want):
    """Return the root mean square error relative to the largest finite value; raise on bad
    shapes."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want), err_msg="infinities")
    finite = np.isfinite(want)
    if not finite.any():
        return 0.0
    difference = got[finite] - want[finite]
    assert np.isfinite(difference).all(), "NaN or infinity where the oracle is finite"
    size = max(np.abs(want[finite]).max(), np.finfo(np.float32).tiny)
    return float(np.sqrt(np.mean(difference**2)) / size)
