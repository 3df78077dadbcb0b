"""The whole attention layer in float64 NumPy, forward and by hand; it imports nothing of the library.

B batch   T query length   S key length   N query heads   K key-value heads
D input width   E output width   H query-key head size   V value head size

Results are {name: array}: "output", "scores", "losses" (sorted), "gradient <input>" and for every weight
"gradient <projection> <part>" and "constrained <projection> <part>".
"""

import numpy as np

_EPSILON = 1e-7  # Keras's, in the norms of its constraints


def fold(x, axes):
    """Turn [<axes>, *rest] with `axes` of all but the last attended into [B, L, D]."""
    lead = [a for a in range(x.ndim - 1) if a not in axes]
    y = x.transpose(*lead, *axes, x.ndim - 1)
    batch, length = (int(np.prod([x.shape[a] for a in part])) for part in (lead, axes))
    return y.reshape(batch, length, x.shape[-1])


def unfold(y, shape, axes):
    """Turn [B, L, *rest] back into [*shape, *rest]."""
    lead = [a for a in range(len(shape)) if a not in axes]
    order = [*lead, *axes]
    y = y.reshape(*(shape[a] for a in order), *y.shape[2:])
    return np.moveaxis(y, range(len(order)), order)


def penalty(rule, x):
    """Return the value and the gradient of {"l1": a, "l2": b}, or of None."""
    if rule is None:
        return None, 0.0
    a, b = rule.get("l1", 0.0), rule.get("l2", 0.0)
    return a * np.abs(x).sum() + b * (x * x).sum(), a * np.sign(x) + 2 * b * x


def constrained(rule, w):
    """Return a weight after {"class_name": ..., "config": ...}, or after None."""
    if rule is None:
        return w
    kind, config = rule["class_name"], rule["config"]
    if kind == "NonNeg":
        return np.maximum(w, 0)
    axis = config["axis"]
    axis = tuple(axis) if isinstance(axis, (list, tuple)) else axis
    norms = np.sqrt((w * w).sum(axis=axis, keepdims=True))
    wanted = {
        "UnitNorm": lambda: 1.0,
        "MaxNorm": lambda: np.minimum(norms, config["max_value"]),
        "MinMaxNorm": lambda: (
            config["rate"] * np.clip(norms, config["min_value"], config["max_value"])
            + (1 - config["rate"]) * norms
        ),
    }[kind]()
    return w * (wanted / (_EPSILON + norms))


def layer(params, query, value, key, axes, visible, rules, d_output, d_scores):
    """Return everything about the loss sum(output * d_output) + sum(scores * d_scores) + penalties.

    Args:
      params: {projection: {"kernel": ..., "bias": ...}}.
      query, value, key: Inputs; key may be None.
      axes: Attended axes, counted from the front.
      visible: Booleans [B, N, T, S].
      rules: "kernel_regularizer" and so on: what `penalty` and `constrained` take.
      d_output: Cotangent of the output.
      d_scores: Cotangent [B, N, T, S] of the scores, or None.
    """
    w = {n: {p: np.asarray(x, np.float64) for p, x in g.items()} for n, g in params.items()}
    x_q, x_v = (fold(np.asarray(x, np.float64), axes) for x in (query, value))
    x_k = x_v if key is None else fold(np.asarray(key, np.float64), axes)
    inputs = {"query": x_q, "value": x_v, "key": x_k, "gate": x_q}
    losses, d_weights = [], {n: {} for n in w}

    def project(name):
        y = np.einsum("btd,dnh->btnh", inputs[name], w[name]["kernel"])
        return y + w[name].get("bias", 0.0)

    def activity(y, source):
        """Return the slope of the penalty on a projection, which Keras divides by the first axis."""
        loss, slope = penalty(rules["activity_regularizer"], y)
        losses.append(loss if loss is None else loss / source.shape[0])
        return slope / source.shape[0]

    q, k, v = project("query"), project("key"), project("value")
    groups = q.shape[2] // k.shape[2]
    k_all, v_all = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    scale = q.shape[-1] ** -0.5
    x = np.where(visible, scale * np.einsum("btnh,bsnh->bnts", q, k_all), -np.inf)
    m = x.max(-1, keepdims=True)
    p = np.exp(x - np.where(np.isinf(m), 0, m))
    total = p.sum(-1, keepdims=True)
    p = p / np.where(total > 0, total, 1)
    attended = np.einsum("bnts,bsnv->btnv", p, v_all)
    gate = 1 / (1 + np.exp(-project("gate"))) if "gate" in w else np.ones_like(attended)
    heads = attended * gate
    kernel = w["attention_output"]["kernel"]
    y = np.tensordot(heads, kernel, 2) + w["attention_output"].get("bias", 0.0)

    d_y = fold(d_output.reshape(*query.shape[:-1], -1), axes).reshape(y.shape)
    d_y = d_y + activity(y, query)
    flat = d_y.reshape(*d_y.shape[:2], -1)
    matrix = kernel.reshape(*kernel.shape[:2], -1)
    d_weights["attention_output"]["kernel"] = np.einsum("btnv,bte->nve", heads, flat).reshape(
        kernel.shape
    )
    d_weights["attention_output"]["bias"] = d_y.sum((0, 1))
    d_heads = np.einsum("bte,nve->btnv", flat, matrix)
    d_attended = d_heads * gate
    d_p = np.einsum("btnv,bsnv->bnts", d_attended, v_all)
    d_p = d_p if d_scores is None else d_p + d_scores
    d_x = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * scale

    def shared(y):
        b, s, n, size = y.shape
        return y.reshape(b, s, n // groups, groups, size).sum(3)

    slopes = {
        "query": np.einsum("bnts,bsnh->btnh", d_x, k_all) + activity(q, query),
        "key": shared(np.einsum("bnts,btnh->bsnh", d_x, q)) + activity(k, value),
        "value": shared(np.einsum("bnts,btnv->bsnv", p, d_attended)) + activity(v, value),
    }
    if "gate" in w:
        slopes["gate"] = (d_heads * attended + activity(gate, query)) * gate * (1 - gate)
    d_inputs = {name: np.zeros_like(x) for name, x in inputs.items()}
    for name, slope in slopes.items():
        d_weights[name]["kernel"] = np.einsum("btd,btnh->dnh", inputs[name], slope)
        d_weights[name]["bias"] = slope.sum((0, 1))
        d_inputs[name] += np.einsum("btnh,dnh->btd", slope, w[name]["kernel"])
    d_inputs["query"] = d_inputs["query"] + d_inputs["gate"]
    if key is None:
        d_inputs["value"] = d_inputs["value"] + d_inputs["key"]

    result = {
        "output": unfold(y, query.shape[:-1], axes),
        "scores": p,
        "gradient query": unfold(d_inputs["query"], query.shape[:-1], axes),
        "gradient value": unfold(d_inputs["value"], value.shape[:-1], axes),
    }
    if key is not None:
        result["gradient key"] = unfold(d_inputs["key"], key.shape[:-1], axes)
    for name, group in w.items():
        for part, weight in group.items():
            loss, slope = penalty(rules[f"{part}_regularizer"], weight)
            losses.append(loss)
            result[f"gradient {name} {part}"] = d_weights[name][part] + slope
            result[f"constrained {name} {part}"] = constrained(rules[f"{part}_constraint"], weight)
    result["losses"] = np.sort([x for x in losses if x is not None])
    return result
