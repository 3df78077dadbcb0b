"""Query, key and value out of one matrix, as PyTorch's models keep them."""

import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Rotary, WeightsError
from mha_jax.models.layouts import import_attention, separated, split


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("layout", ["stacked", "grouped"])
@pytest.mark.parametrize("width", [(), (7,)])
def test_every_row_goes_to_its_head(layout, kv_heads, width):
    heads, size = 4, 3
    draw = np.random.default_rng(0).standard_normal
    query = draw((kv_heads, heads // kv_heads, size, *width))
    key, value = draw((2, kv_heads, 1, size, *width))
    if layout == "stacked":
        fused = np.concatenate([x.reshape(-1, *width) for x in (query, key, value)])
    else:
        fused = np.concatenate([query, key, value], 1).reshape(-1, *width)
    parts = split(fused, layout, heads, kv_heads)
    for part, whole in zip(parts, (query, key, value)):
        np.testing.assert_array_equal(part, whole.reshape(-1, *width))


def test_names_are_those_of_separate_projections():
    tensors = {"h.0.attn.c_attn.weight": np.zeros((18, 5)), "qkv_proj.bias": np.zeros(18)}
    found = separated(tensors | {"wte.weight": np.zeros((2, 5))}, num_heads=4, num_kv_heads=1)
    assert {name: x.shape for name, x in found.items()} == {
        "h.0.attn.q_proj.weight": (12, 5),
        "h.0.attn.k_proj.weight": (3, 5),
        "h.0.attn.v_proj.weight": (3, 5),
        "q_proj.bias": (12,),
        "k_proj.bias": (3,),
        "v_proj.bias": (3,),
        "wte.weight": (2, 5),
    }


def test_rows_that_are_no_heads_are_refused():
    with pytest.raises(WeightsError, match="have 13 rows, which must be those of 4 query heads"):
        split(np.zeros((13, 2)), "stacked", num_heads=4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_is_imported_by_the_names_of_its_projections(fused):
    draw = np.random.default_rng(0).standard_normal
    rows = {"q_proj": 12, "k_proj": 6, "v_proj": 6, "o_proj": 7}
    state = {
        f"{k}.weight": draw((n, 12 if k == "o_proj" else 5), np.float32) for k, n in rows.items()
    }
    state |= {f"{k}.bias": draw(n, np.float32) for k, n in rows.items() if k != "o_proj"}
    state |= {f"{k}_norm.weight": draw(3, np.float32) for k in "qk"}
    given = dict(state)
    if fused:
        for part in ("weight", "bias"):
            pieces = [given.pop(f"{k}_proj.{part}") for k in "qkv"]
            given[f"qkv_proj.{part}"] = np.concatenate(pieces)
    given = {f"layers.0.attn.{name}": x for name, x in given.items()}
    layer, variables = import_attention(
        given, 4, 2, prefix="layers.0.attn.", rotary=Rotary(fraction=2 / 3)
    )
    assert (layer.key_dim, layer.qk_norm, layer.use_bias) == (3, "rms", ("query", "key", "value"))
    x = draw((2, 3, 5), np.float32)
    heads = {
        k: (x @ state[f"{k}_proj.weight"].T + state[f"{k}_proj.bias"]).reshape(2, 3, -1, 3)
        for k in "qkv"
    }
    for k in "qk":
        square = np.square(heads[k]).mean(-1, keepdims=True)
        normed = heads[k] / np.sqrt(square + 1e-6) * state[f"{k}_norm.weight"]
        heads[k] = np.asarray(layer.rotary(normed, np.arange(3)))
    out = mj.dot_product_attention(heads["q"], heads["k"], heads["v"])
    want = np.asarray(out).reshape(2, 3, -1) @ state["o_proj.weight"].T
    np.testing.assert_allclose(layer.apply(variables, x, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("rms_over_heads", ((12,), (6,))),
        ("layer_per_head", ((4, 3), (2, 3))),
        ("rms", ((3,), (3,))),
    ],
)
def test_norms_are_told_by_the_shape_of_their_weights(kind, shapes):
    draw = np.random.default_rng(0).standard_normal
    rows = {"q_proj": 12, "k_proj": 6, "v_proj": 6, "o_proj": 12}
    state = {f"{k}.weight": draw((n, 12), np.float32) for k, n in rows.items()}
    state |= {f"{k}_norm.weight": draw(shape, np.float32) for k, shape in zip("qk", shapes)}
    layer, variables = import_attention(state, 4, 2)
    assert layer.qk_norm == kind
    for ours, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        got = variables["params"][ours]["scale"]
        np.testing.assert_array_equal(np.ravel(got), state[f"{name}.weight"].ravel())
    with pytest.raises(
        WeightsError, match=r"q_norm\.weight has shape \(5,\), but query_norm/scale"
    ):
        import_attention(state | {"q_norm.weight": np.ones(5, np.float32)}, 4, 2, qk_norm=kind)


def test_what_is_no_attention_is_told_so():
    with pytest.raises(
        WeightsError, match=r"no whole attention under 'h\.': missing \['q_proj or query"
    ):
        import_attention({"h.up.weight": np.zeros((3, 2))}, 2, prefix="h.")
