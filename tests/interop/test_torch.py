"""torch.nn.MultiheadAttention and ours, both ways."""

import doctest
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import MultiHeadAttention
from mha_jax.errors import ShapeError, UnsupportedError, WeightsError
from mha_jax.interop import torch as interop
from tests.drawn import draw_variables
from tests.oracles import layer as oracle

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")

B, T, S, E, N, K, V = 2, 5, 7, 12, 4, 11, 3
RNG = np.random.default_rng(0)
X, KEY, VALUE = (RNG.standard_normal((B, *s), np.float32) for s in ((T, E), (S, K), (S, V)))
SAME = RNG.standard_normal((B, S, E), np.float32)
HIDDEN = RNG.random((B * N, T, S)) < 0.3
HIDDEN[..., 0] = False  # a query that sees nothing is NaN in torch
ADDED = RNG.standard_normal(HIDDEN.shape, np.float32)
PADDING = np.arange(S)[None] >= np.array([[S], [4]])
SETTINGS = {
    "packed": {},
    "no bias": {"bias": False},
    "separate": {"kdim": K, "vdim": V},
    "separate without bias": {"kdim": K, "vdim": V, "bias": False},
    "one width of its own": {"vdim": V},
    "time first": {"batch_first": False, "kdim": K},
    "dropout": {"dropout": 0.25},
}


def state(separate=False, bias=True, dtype=np.float32, kdim=K, vdim=V):
    """Return a state_dict as torch would write it, of NumPy arrays."""
    rng = np.random.default_rng(1)
    if separate:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        shapes = {name: (E, width) for name, width in zip(names, (E, kdim, vdim))}
    else:
        shapes = {"in_proj_weight": (3 * E, E)}
    shapes["out_proj.weight"] = (E, E)
    if bias:
        shapes |= {"in_proj_bias": (3 * E,), "out_proj.bias": (E,)}
    return {name: (rng.standard_normal(s) / 3).astype(dtype) for name, s in shapes.items()}


def peer(dtype=None, **more):
    """Return a torch layer in evaluation mode with random weights, biases too."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(E, N, **{"batch_first": True, "dtype": dtype, **more})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 3)
    return layer.eval()


def call(layer, query, key, value, **masks):
    """Run a torch layer on arrays [B, T, E]."""
    inputs = [torch.from_numpy(x) for x in (query, key, value)]
    if not layer.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    masks = {name: torch.from_numpy(x) for name, x in masks.items()}
    with torch.no_grad():
        out, _ = layer(*inputs, **masks, need_weights=False)
    return (out if layer.batch_first else out.transpose(0, 1)).numpy()


def inputs_of(layer):
    key = KEY if layer.kdim == K else SAME
    return X, key, VALUE if layer.vdim == V else SAME


def equal(got, want):
    """Raise unless two dicts of arrays are the same, bit for bit."""
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        assert got[name].tobytes() == x.tobytes(), name


@needs_torch
@pytest.mark.parametrize("settings", SETTINGS)
def test_there_and_back(settings):
    layer = peer(**SETTINGS[settings])
    module, variables = interop.import_layer(layer)
    assert (module.num_heads, module.key_dim, module.dropout) == (N, E // N, layer.dropout)
    again = interop.export_layer(module, variables, batch_first=layer.batch_first)
    equal(*({k: v.numpy() for k, v in x.state_dict().items()} for x in (again, layer)))
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first"):
        assert getattr(again, name) == getattr(layer, name), name
    assert again.training is True
    assert interop.import_layer(again)[0] == module


@needs_torch
@pytest.mark.parametrize(
    "masks", ["none", "dense", "two axes", "padding", "both", "floats", "bias"]
)
@pytest.mark.parametrize("settings", SETTINGS)
def test_outputs(settings, masks):
    layer = peer(**SETTINGS[settings])
    module, variables = interop.import_layer(layer)
    query, key, value = inputs_of(layer)
    given = {
        "none": {},
        "dense": {"attn_mask": HIDDEN},
        "two axes": {"attn_mask": HIDDEN[0]},
        "padding": {"key_padding_mask": PADDING},
        "both": {"attn_mask": HIDDEN, "key_padding_mask": PADDING},
        "floats": {"attn_mask": np.where(HIDDEN, np.float32(-np.inf), np.float32(0))},
        "bias": {"attn_mask": np.where(HIDDEN, np.float32(-np.inf), ADDED)},
    }[masks]
    ours = interop.import_masks(**given, num_heads=N)
    got = module.apply(variables, query, value, key, **ours)
    want = call(layer, query, key, value, **given)
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)
    bias = ADDED.reshape(B, N, T, S) if masks == "bias" else 0.0
    exact = oracle(variables["params"], query, value, key, visible=_visible(given), bias=bias)[0]
    errors = [np.abs(np.asarray(x) - exact).max() for x in (got, want)]
    assert errors[0] <= max(2 * errors[1], 5e-7)


def _visible(given):
    hidden = given.get("attn_mask", np.False_)
    hidden = np.isneginf(hidden) if hidden.dtype == np.float32 else hidden
    if hidden.ndim == 3:
        hidden = hidden.reshape(B, N, T, S)
    return ~(hidden | given.get("key_padding_mask", np.zeros((B, S), bool))[:, None, None])


@needs_torch
def test_causal_and_gradients():
    layer = peer()
    module, variables = interop.import_layer(layer)
    hidden = np.triu(np.ones((T, T), bool), 1)
    x = torch.from_numpy(X).requires_grad_()
    out, _ = layer(x, x, x, attn_mask=torch.from_numpy(hidden), need_weights=False)
    out.sin().sum().backward()

    def loss(variables, x):
        out = module.apply(variables, x, x, use_causal_mask=True)
        return jnp.sum(jnp.sin(out)), out

    (_, got), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        variables, jnp.asarray(X)
    )
    np.testing.assert_allclose(got, out.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(gradients[1], x.grad.numpy(), atol=5e-6)
    theirs = interop.export_state(module, gradients[0])
    for name, parameter in layer.named_parameters():
        np.testing.assert_allclose(theirs[name], parameter.grad.numpy(), atol=1e-5, err_msg=name)


@needs_torch
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_other_dtypes_keep_their_bits(name, request):
    if name == "float64":
        request.getfixturevalue("x64")
    layer = peer(dtype=getattr(torch, name), kdim=K)
    module, variables = interop.import_layer(layer)
    assert module.param_dtype == jnp.dtype(name)
    again = interop.export_layer(module, variables)
    for key, value in layer.state_dict().items():
        assert again.state_dict()[key].dtype == value.dtype
        assert torch.equal(again.state_dict()[key], value), key


@needs_torch
def test_float64_needs_64_bit_types():
    with pytest.raises(WeightsError, match=r"query kernel is float64, .*jax_enable_x64"):
        interop.import_layer(peer(dtype=torch.float64))


@needs_torch
def test_training_is_set_where_the_module_has_it():
    module, variables = interop.import_state(state(), N)
    assert interop.export_layer(module.clone(training=False), variables).training is False


@needs_torch
def test_layers_that_are_refused():
    own = r"no counterpart for these arguments of torch\.nn\.MultiheadAttention: "
    with pytest.raises(UnsupportedError, match=own + r"add_bias_kv=True \(the state holds bias_"):
        interop.import_layer(peer(add_bias_kv=True))
    with pytest.raises(UnsupportedError, match=own + r"add_zero_attn=True \(no key of zeros"):
        interop.import_layer(peer(add_zero_attn=True))
    with pytest.raises(
        WeightsError, match=r"cannot import a torch.*Linear: .*get_submodule\(name\)"
    ):
        interop.import_layer(torch.nn.Linear(2, 3))

    class Own(torch.nn.MultiheadAttention):
        pass

    with pytest.raises(WeightsError, match=r"cannot import a tests.*Own: .*subclass of one"):
        interop.import_layer(Own(E, N))


CHANGES = {
    "_forward_hooks": lambda x: x.register_forward_hook(lambda m, i, out: (2 * out[0], out[1])),
    "_forward_pre_hooks": lambda x: x.register_forward_pre_hook(lambda m, i: (2 * i[0], *i[1:])),
    "forward": lambda x: setattr(x, "forward", lambda *inputs, **_: (inputs[0], None)),
    "merge_masks": lambda x: setattr(x, "merge_masks", lambda *_: (None, None)),
}


@needs_torch
@pytest.mark.parametrize("name", CHANGES)
def test_hooks_and_methods_of_a_layer_are_refused(name):
    layer = peer()
    CHANGES[name](layer)
    with pytest.raises(WeightsError, match=rf"the layer has {name} of its own.*import_state\("):
        interop.import_layer(layer)
    module, variables = interop.import_state(layer.state_dict(), layer.num_heads)
    assert module == interop.import_layer(peer())[0]
    equal(
        interop.export_state(module, variables),
        {k: v.numpy() for k, v in layer.state_dict().items()},
    )


@needs_torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_changes_no_output_is_no_obstacle():
    layer = peer()
    layer.compile()
    layer.register_full_backward_hook(lambda *_: None)
    layer.out_proj.register_forward_hook(lambda m, i, out: 2 * out)  # torch reads its weights only
    module, variables = interop.import_layer(layer)
    want = call(peer(), X, SAME, SAME)
    np.testing.assert_allclose(module.apply(variables, X, SAME, SAME), want, atol=1e-6, rtol=1e-6)


@needs_torch
def test_the_skipped_examples_run():
    for function in (interop.import_layer, interop.export_layer):
        text = function.__doc__.replace("# doctest: +SKIP", "")
        names = {**vars(interop), "jax": jax}
        test = doctest.DocTestParser().get_doctest(text, names, function.__name__, None, None)
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_states_of_numpy_arrays_there_and_back(separate, bias, dtype):
    given = state(separate, bias, dtype)
    module, variables = interop.import_state(given, N, dropout=0.1)
    assert (module.use_bias, module.dropout, module.param_dtype) == (bias, 0.1, jnp.dtype(dtype))
    equal(interop.export_state(module, variables), given)


def test_a_state_by_the_formula_of_torch():
    given = state(separate=True)
    module, variables = interop.import_state(given, N)
    parts = np.split(given["in_proj_bias"], 3)
    q, k, v = (
        (x @ given[f"{name}_proj_weight"].T + bias).reshape(B, -1, N, E // N)
        for x, name, bias in zip((X, KEY, VALUE), "qkv", parts)
    )
    logits = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(E // N)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heads = np.einsum("BNTS,BSNH->BTNH", p, v).reshape(B, T, E)
    want = heads @ given["out_proj.weight"].T + given["out_proj.bias"]
    np.testing.assert_allclose(module.apply(variables, X, VALUE, KEY), want, atol=2e-6)


def test_a_layer_inside_a_model():
    whole = {f"encoder.0.attn.{name}": x for name, x in state().items()} | {"head.weight": X}
    module, variables = interop.import_state(whole, N, prefix="encoder.0.attn.")
    equal(interop.export_state(module, variables), state())
    with pytest.raises(WeightsError, match=r"out_proj\.weight: found \['encoder"):
        interop.import_state(whole, N)


def _states():
    good = state()
    yield {}, N, r"no q_proj_weight, k_proj_weight, v_proj_weight, out_proj\.weight: found nothing"
    yield good | {"fc.bias": X}, N, r"holds \['fc\.bias'\], which a torch.* has not.*prefix="
    yield good, 5, r"num_heads must divide .*got num_heads=5 and width 12"
    yield good, 0, r"got num_heads=0"
    yield good | {"in_proj_weight": np.ones((35, E))}, N, r"in_proj_weight must have.*\(35, 12\)"
    yield good | {"out_proj.weight": np.ones(E)}, N, r"out_proj\.weight must have .*two axes: got"
    yield good | {"in_proj_bias": np.ones(5)}, N, r"biases do not fit each other: .*\(5,\)"
    yield state(bias=False) | {"out_proj.bias": np.ones(E)}, N, r"got \{'out_proj\.bias': \(12,\)\}"
    narrow = state(separate=True) | {"q_proj_weight": np.ones((E, 5), np.float32)}
    yield narrow, N, r"query weights do not fit a layer of width 12.*\(12, 5\).*expected \(12, 12\)"
    yield good | {"in_proj_weight": np.ones((36, E), np.int8)}, N, r"query kernel has dtype int8"


@pytest.mark.parametrize("given, heads, message", list(_states()))
def test_states_that_are_refused(given, heads, message):
    with pytest.raises(WeightsError, match=message):
        interop.import_state(given, heads)


def test_appended_biases_are_refused():
    with pytest.raises(UnsupportedError, match=r"add_bias_kv=True \(the state holds bias_k\)"):
        interop.import_state(state() | {"bias_k": np.ones((1, 1, E))}, N)


def _exports():
    yield {"key_dim": 5}, r"key_dim \(num_heads \* key_dim must be 12, the width of the query\)"
    yield {"value_dim": 5}, r"value_dim \(5 differs from key_dim=3\)"
    yield {"output_shape": 7}, r"output_shape \(\(7,\) is not 12, the width of the query\)"
    yield {"dtype": "bfloat16"}, r"dtype \(torch computes in the dtype of the weights, .*float32"
    yield {"use_gate": True}, r"use_gate \(there is no gate\)"
    yield {"num_kv_heads": 2}, r"num_kv_heads \(2 of 4 heads\)"
    yield {"sliding_window": 2, "seed": 1}, r"sliding_window \(2: .*\); seed \(1: apply it yourself"


@pytest.mark.parametrize("arguments, message", list(_exports()))
def test_exports_that_are_refused(arguments, message):
    module = MultiHeadAttention(**({"num_heads": N, "key_dim": 3} | arguments))
    variables = draw_variables(module, X, X)
    with pytest.raises(
        UnsupportedError, match=r"MultiheadAttention has no counterpart.*" + message
    ):
        interop.export_state(module, variables)


def mixed(**dtypes):
    """Return a module and variables with projections in dtypes of their own."""
    module = MultiHeadAttention(N, E // N)
    params = dict(draw_variables(module, X, X)["params"])
    for name, dtype in dtypes.items():
        params[name] = jax.tree.map(lambda x, to=dtype: x.astype(to), params[name])
    return module, {"params": params}


def test_parameters_of_several_dtypes_keep_their_numbers():
    module, variables = mixed(query=jnp.float16, key=jnp.bfloat16)
    state = interop.export_state(module, variables)
    for name, x in zip(("query", "key", "value"), np.split(state["in_proj_weight"], 3)):
        want = np.asarray(variables["params"][name]["kernel"]).reshape(E, E).T
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, want.astype(np.float32))


@needs_torch
def test_parameters_of_several_dtypes_are_no_layer():
    with pytest.raises(WeightsError, match=r"dtypes \['bfloat16', 'float32'\] .*Cast them"):
        interop.export_layer(*mixed(attention_output=jnp.bfloat16))
    layer = interop.export_layer(*mixed(query=jnp.bfloat16))  # packed in float32
    assert {x.dtype for x in layer.parameters()} == {torch.float32}


UNREADABLE = {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "half meta": lambda x: x.bfloat16().to("meta"),
    "ragged": lambda x: [[1.0], [1.0, 2.0]],
}


@needs_torch
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_tensors_without_numbers_to_read(kind):
    change = UNREADABLE[kind]
    given = peer().state_dict()
    wrong = {"a.in_proj_weight": change(given.pop("in_proj_weight"))}
    good = {f"a.{name}": x for name, x in given.items()}
    with pytest.raises(WeightsError, match=r"a\.in_proj_weight cannot be read: got .*dense"):
        interop.import_state(good | wrong, N, prefix="a.")
    with pytest.raises(ShapeError, match=r"attn_mask cannot be read: got .*dense"):
        interop.import_masks(change(torch.zeros(T, S)), num_heads=N)


@needs_torch
def test_a_layer_on_the_meta_device_has_no_weights():
    with pytest.raises(WeightsError, match=r"in_proj_weight cannot be read: .*device meta"):
        interop.import_layer(torch.nn.MultiheadAttention(E, N, device="meta"))


@needs_torch
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_view_that_turns_the_sign_is_read_with_it(name):
    state = peer(dtype=getattr(torch, name)).state_dict()
    views = {key: torch._neg_view(x) for key, x in state.items()}
    got, want = (interop.import_state(x, N)[1] for x in (views, state))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(a, -b)


def test_variables_of_another_module():
    variables = draw_variables(MultiHeadAttention(N, 3), X, X)
    with pytest.raises(WeightsError, match=r"query bias: \(4, 3\), expected none"):
        interop.export_state(MultiHeadAttention(N, 3, use_bias=False), variables)


def test_masks():
    got = interop.import_masks(HIDDEN, PADDING, num_heads=N)
    np.testing.assert_array_equal(got["attention_mask"], ~HIDDEN.reshape(B, N, T, S))
    np.testing.assert_array_equal(got["value_mask"], ~PADDING)
    assert interop.import_masks(num_heads=N) == {}
    assert interop.import_masks(key_padding_mask=PADDING[0], num_heads=N)["value_mask"].shape == (
        S,
    )
    with pytest.raises(
        ShapeError,
        match=r"\[B \* num_heads, T, S\].*: got \(8, 5, 7\) with num_heads=3 and a batch of 2",
    ):
        interop.import_masks(HIDDEN, num_heads=3)
    for given in (
        {"batch": 3},
        {"key_padding_mask": PADDING[:1]},
        {"key_padding_mask": PADDING[0]},
    ):
        with pytest.raises(ShapeError, match=r"an attn_mask of three axes .*got \(8, 5, 7\)"):
            interop.import_masks(HIDDEN, num_heads=N, **given)
    with pytest.raises(ShapeError, match=r"\[B, S\] with B = batch: got \(2, 7\) and batch=3"):
        interop.import_masks(key_padding_mask=PADDING, num_heads=N, batch=3)
    with pytest.raises(ShapeError, match=r"attn_mask must have 2 or 3 axes, .*\(2, 4, 5, 7\)"):
        interop.import_masks(HIDDEN.reshape(B, N, T, S), num_heads=N)
    with pytest.raises(ShapeError, match=r"key_padding_mask must hold booleans.*dtype int64"):
        interop.import_masks(key_padding_mask=PADDING.astype(np.int64), num_heads=N)
    with pytest.raises(
        UnsupportedError, match=r"key_padding_mask holds floats .* bias=key_padding"
    ):
        interop.import_masks(key_padding_mask=np.full((B, S), -1e9), num_heads=N)


def test_floats_of_a_mask_are_a_bias_and_what_they_hide():
    added = ADDED.reshape(B, N, T, S)
    got = interop.import_masks(ADDED, num_heads=N)
    assert set(got) == {"bias"} and got["bias"].tobytes() == added.tobytes()
    got = interop.import_masks(np.where(HIDDEN[0], -np.inf, ADDED[0]), num_heads=N)
    np.testing.assert_array_equal(got["attention_mask"], ~HIDDEN[0])
    np.testing.assert_array_equal(got["bias"], np.where(HIDDEN[0], 0, ADDED[0]))
    assert set(interop.import_masks(np.zeros((T, S), np.float32), num_heads=N)) == {
        "attention_mask"
    }


def test_a_mask_of_every_head_tells_an_unbatched_call_from_a_batch_of_one():
    one = HIDDEN[:N]
    assert interop.import_masks(one, num_heads=N)["attention_mask"].shape == (N, T, S)
    for given in ({"batch": 1}, {"key_padding_mask": PADDING[:1]}):
        got = interop.import_masks(one, num_heads=N, **given)
        np.testing.assert_array_equal(got["attention_mask"], ~one[None])
    got = interop.import_masks(one, PADDING[0], num_heads=N)
    assert got["attention_mask"].shape == (N, T, S) and got["value_mask"].shape == (S,)
    module, x = MultiHeadAttention(N, 3), np.ones((S, 5), np.float32)
    variables = draw_variables(module, x[:T], x)
    module.apply(variables, x[:T], x, **got)
    with pytest.raises(ShapeError, match="attention_mask"):
        module.apply(variables, x[None, :T], x[None], **got)


def test_heads_may_be_counted_by_numpy():
    state = {"in_proj_weight": np.ones((12, 4), np.float32), "out_proj.weight": np.eye(4)}
    state["out_proj.weight"] = state["out_proj.weight"].astype(np.float32)
    module, _ = interop.import_state(state, np.int64(2))
    assert type(module.num_heads) is int and (module.num_heads, module.key_dim) == (2, 2)
    for heads in (True, 2.0, "2", None, np.int64(-2), 3):
        with pytest.raises(WeightsError, match="num_heads must divide the width of the layer"):
            interop.import_state(state, heads)


def test_torch_is_not_imported_for_states():
    program = """
import sys, numpy as np
sys.modules["torch"] = None
from mha_jax.interop import torch as interop
state = {"in_proj_weight": np.ones((12, 4), np.float32), "out_proj.weight": np.ones((4, 4), np.float32)}
module, variables = interop.import_state(state, num_heads=2)
interop.import_masks(np.ones((2, 2), bool), num_heads=2)
assert set(interop.export_state(module, variables)) == set(state)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
