"""Query, key and value out of one matrix, as PyTorch's models keep them."""

import jax
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


WHOLE = {f"{name}_proj.weight": np.ones((12, 12), np.float32) for name in "qkvo"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"k_norm.weight": np.ones(3, np.float32)}, r"no place in the layer: k_norm\.weight"),
        ({"relative_attention_bias.weight": np.ones((32, 4), np.float32)}, "no place in the layer"),
        ({"q_proj.lora_A.weight": np.ones((2, 12), np.float32)}, "no place in the layer"),
        ({"query.weight": np.ones((12, 12), np.float32)}, r"no place in the layer: query\.weight"),
        ({"qkv_proj.weight": np.ones((36, 12), np.float32)}, r"there are both 'qkv_proj\.weight'"),
        ({"sinks": np.ones(4, np.float32), "use_sinks": False}, r"no place in the layer: sinks"),
        ({"bias": np.ones(12, np.float32)}, r"no place in the layer: bias"),
        ({"o_proj.weight": np.ones((), np.float32)}, r"'attention_output': \(\)"),
        ({"v_proj.weight": np.ones((), np.float32)}, r"'value': \(\)"),
        ({"q_proj.weight": np.ones((0, 12), np.float32)}, r"'query': \(0, 12\)"),
        ({"layout": "other"}, "layout must be one of stacked, grouped"),
    ],
)
def test_weights_that_have_no_place_are_refused(more, message):
    arguments = {name: more[name] for name in more if name in ("use_sinks", "layout")}
    state = WHOLE | {name: x for name, x in more.items() if name not in arguments}
    with pytest.raises(WeightsError, match=message):
        import_attention(state, 4, **arguments)


def test_masks_and_frequencies_of_modules_are_no_weights():
    buffers = {"bias": np.ones((1, 1, 5, 5)), "rotary_emb.inv_freq": np.ones(2)}
    layer, _ = import_attention(WHOLE | buffers, 4)
    assert layer.use_bias is False


def test_sinks_are_found():
    sinks = np.arange(4, dtype=np.float32)
    layer, variables = import_attention(WHOLE | {"sinks": sinks}, 4)
    assert layer.use_sinks
    np.testing.assert_array_equal(jax.tree.leaves(variables["params"]["sinks"])[0].ravel(), sinks)


def test_matrices_that_lie_as_gpt2s_are_turned():
    draw = np.random.default_rng(0).standard_normal
    sizes = {
        "c_attn.weight": (36, 12),
        "c_attn.bias": 36,
        "c_proj.weight": (12, 12),
        "c_proj.bias": 12,
    }
    state = {name: draw(size).astype(np.float32) for name, size in sizes.items()}
    for bias in ("c_attn.bias", "none"):  # without it the output's matrix tells
        turned = {name: x.T for name, x in state.items()}
        want, got = (import_attention(x, 4)[1] for x in (state, turned))
        jax.tree.map(np.testing.assert_array_equal, got, want)
        state.pop(bias, None)


def test_fused_matrices_that_may_be_meant_in_two_ways_are_refused():
    weights = {"qkv_proj.weight": (36, 24), "o_proj.weight": (8, 12)}
    state = {name: np.ones(shape, np.float32) for name, shape in weights.items()}
    with pytest.raises(WeightsError, match=r"may be \(out, in\), or \(in, out\)"):
        import_attention(state, 4)
    layer, _ = import_attention(state | {"qkv_proj.bias": np.ones(36, np.float32)}, 4)
    assert layer.output_shape == (8,)
    with pytest.raises(WeightsError, match="there are both"):
        separated({f"{name}.bias": np.ones(36) for name in ("c_attn", "qkv_proj")}, 4)


def test_a_layout_that_is_said_is_taken():
    rows = np.arange(36, dtype=np.float32)[:, None] * np.ones((1, 12), np.float32)
    state = {"c_attn.weight": rows, "c_proj.weight": np.ones((12, 12), np.float32)}
    _, variables = import_attention(state, 4, layout="grouped")
    want = split(rows, "grouped", 4)
    for name, x in zip(("query", "key", "value"), want, strict=True):
        got = variables["params"][name]["kernel"].reshape(12, 12)
        np.testing.assert_array_equal(got, x.T, err_msg=name)


@pytest.mark.parametrize(
    ("fused", "options", "message"),
    [
        (np.ones(12), {"layout": "other"}, "layout must be one of stacked, grouped: got 'other'"),
        (np.ones(12), {"num_heads": 0}, "num_heads must be an integer from 1"),
        (np.ones(12), {"num_heads": None}, "num_heads must be an integer from 1"),
        (np.ones(12), {"num_kv_heads": 0}, "num_kv_heads must be an integer from 1"),
        (np.ones(()), {}, r"must be \[R, D\] or \[R\]: got shape \(\)"),
        (np.ones((0, 3)), {}, r"got shape \(0, 3\)"),
        ([1.0] * 12, {}, "must be a NumPy array"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(fused, options, message):
    with pytest.raises(mj.MhaError, match=message):
        split(fused, **({"layout": "stacked", "num_heads": 4} | options))


def test_arrays_of_jax_are_taken_apart_too():
    rows = np.arange(12.0, dtype=np.float32)
    want, got = (split(x, "grouped", 4) for x in (rows, jax.numpy.asarray(rows)))
    jax.tree.map(np.testing.assert_array_equal, got, want)
