"""cuDNN's attention without a GPU: the calls are jax's own, and what we make of them is right."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as theirs
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mha_jax as mj
from mha_jax import (
    Call,
    Causal,
    Dense,
    Dropout,
    Full,
    Tokens,
    ValidKeys,
    ValidQueries,
    Window,
    attend,
    explain,
)
from mha_jax.attention.call import Output, State
from mha_jax.attention.check import check
from mha_jax.backends import cudnn
from mha_jax.backends.cudnn import CuDNN
from mha_jax.backends.reference import Reference
from tests import fake_cudnn, oracles

B, T, S, N, K, H, V = 2, 37, 53, 6, 3, 7, 5
RANDOM = np.random.default_rng(0)


def shape_of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(function, *arguments):
    """Return the program for CUDA, as text."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


# ---- the calls are those of jax.nn ---------------------------------------------------------------

CALL = re.compile(
    r"custom_call @(__cudnn\S+?)\((.*?)\) \{(.*?)backend_config = \"(.*?)\"(.*?)\} : (.*)"
)


def calls(text):
    """Return (target, configuration, all else but the operands' names) of every call of cuDNN."""
    found = []
    for target, _, before, configuration, after, types in CALL.findall(text):
        fields = json.loads(configuration.replace(r"\22", '"'))
        found.append((target, fields, before, after, types))
    return sorted(found, key=lambda call: call[0])


@pytest.fixture
def jax_nn(monkeypatch):
    """jax.nn's call of cuDNN, which asks for one while it is traced."""
    monkeypatch.setattr(theirs, "check_cudnn_version", lambda: 91900)

    def attention(q, k, v, **options):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)

    return attention


MASKS = {
    "full": (Full(), {}),
    "causal": (Causal(), {"is_causal": True}),
    "window": (Causal() & Window(100, 0), {"is_causal": True, "local_window_size": (100, 0)}),
    "lengths": (ValidKeys(), {}),
    "causal_lengths": (Causal() & ValidKeys(), {"is_causal": True}),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", MASKS)
def test_the_calls_are_those_of_jax(name, dtype, jax_nn):
    mask, options = MASKS[name]
    q, k = shape_of(2, 384, 8, 64, dtype=dtype), shape_of(2, 256, 2, 64, dtype=dtype)
    lengths, valid = shape_of(2, dtype=jnp.int32), shape_of(2, 256, dtype=jnp.bool_)

    def ours(q, k, v, valid, d_out):
        tokens = Tokens(256, valid=valid) if "lengths" in name else None
        out, pull = jax.vjp(
            lambda q, k, v: attend(Call(q, k, v, mask=mask, scale=0.3, k_tokens=tokens)).out,
            *(q, k, v),
        )
        return out, pull(d_out)

    def peer(q, k, v, lengths, d_out):
        given = {"key_value_seq_lengths": lengths} if "lengths" in name else {}
        out, pull = jax.vjp(lambda *a: jax_nn(*a, scale=0.3, **given, **options), q, k, v)
        return out, pull(d_out)

    ours_ = calls(lowered(ours, q, k, k, valid, q))
    assert ours_ == calls(lowered(peer, q, k, k, lengths, q))
    assert [call[0] for call in ours_] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


def test_operands_come_in_the_order_of_jax(jax_nn):
    x, lse = shape_of(1, 64, 2, 64), shape_of(1, 2, 64, dtype=jnp.float32)

    def ours(q, k, v, d_out, out, m, l):
        problem = check(Call(q, k, v))
        return cudnn._backward(problem, State(out, m, l), Output(d_out, jnp.zeros_like(l)))[:3]

    def peer(q, k, v, d_out, out, m, l):
        return jax.vjp(jax_nn, q, k, v)[1](d_out)

    def given(text):
        (operands,) = (x[1] for x in CALL.findall(text) if "Backward" in x[0])
        return [name if name.startswith("%arg") else "" for name in operands.split(", ")]

    arguments = (x, x, x, x, x, lse, lse)
    seen = given(lowered(peer, *arguments))
    assert seen == ["%arg0", "%arg1", "%arg2", "", "%arg3", ""]
    assert given(lowered(ours, *arguments)) == [*seen[:5], "%arg4"]


def test_the_default_scale_is_that_of_jax(jax_nn):
    x = shape_of(1, 64, 2, 128)
    scales = [
        calls(text)[0][1]["cudnn_fmha_backend_config"]["fmha_scale"]
        for text in (
            lowered(lambda q, k, v: attend(Call(q, k, v)).out, x, x, x),
            lowered(jax_nn, x, x, x),
        )
    ]
    assert np.float32(scales[0]) == np.float32(scales[1])


# ---- who is chosen -------------------------------------------------------------------------------


def test_a_program_takes_cudnn_where_it_is_lowered_for_cuda():
    x = shape_of(1, 129, 2, 64)
    function = jax.jit(lambda q, k, v: attend(Call(q, k, v, mask=Causal())).out)
    for platform, taken in {"cuda": True, "rocm": False, "cpu": False}.items():
        text = function.trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()
        assert ("cudnn" in text) == taken, platform
    several = function.trace(x, x, x).lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert several.count("@__cudnn$fmhaSoftmax") == 1


def test_the_layer_takes_cudnn_forward_and_backward():
    layer = mj.MultiHeadAttention(num_heads=4, key_dim=64, dtype=jnp.bfloat16)
    x = shape_of(2, 128, 32)
    real = shape_of(2, 128, dtype=jnp.bool_)
    variables = jax.eval_shape(
        lambda: layer.init(jax.random.key(0), jnp.ones(x.shape), jnp.ones(x.shape))
    )

    def loss(variables, x, real):
        out = layer.apply(variables, x, x, query_mask=real, value_mask=real, use_causal_mask=True)
        return jnp.sum(out.astype(jnp.float32))

    found = calls(lowered(jax.grad(loss), variables, x, real))
    masks = [fields["cudnn_fmha_backend_config"]["mask_type"] for _, fields, *_ in found]
    assert masks == ["PADDING_CAUSAL"] * 2


def test_explain_and_a_name_know_cudnn():
    x = shape_of(1, 5, 2, 8)
    says = explain(Call(x, x, x), platform="cuda")
    assert says["cudnn"] == "can run"
    assert next(name for name, text in says.items() if text == "can run") == "cudnn"
    zeros = jnp.zeros(x.shape, x.dtype)
    with pytest.raises(mj.errors.UnsupportedError, match="CuDNN cannot run this call: it needs an"):
        attend(Call(zeros, zeros, zeros), "cudnn")


# Cards as they would be known, calls, and what stands in the way.
A100, H100 = CuDNN((8, 0), (12, 9)), CuDNN((9, 0), (12, 9))
X = shape_of(1, 8, 2, 64)
WHY = {
    "dtype": (H100, {"dtype": jnp.float32}, "float16 and bfloat16; q, k and v are float32: cast"),
    "dropout": (H100, {"dropout": Dropout(jax.random.key(0), 0.1)}, "another stream of bits"),
    "bias": (H100, {"bias": np.zeros((8, 8), np.float32)}, "this call has a bias"),
    "cap": (H100, {"logit_cap": 30.0}, "no soft cap; logit_cap is 30.0"),
    "precision": (H100, {"precision": "highest"}, "rounds weights to bfloat16; precision is high"),
    "scale": (H100, {"scale": -1.0}, "a positive scale; scale is -1.0"),
    "dense": (H100, {"mask": Causal() & Dense(np.ones((8, 8), bool))}, "this mask has Dense"),
    "or": (H100, {"mask": Causal() | ValidKeys()}, "this mask has Or"),
    "right": (H100, {"mask": Window(8, 2)}, r"see up to key t\+2"),
    "both": (H100, {"mask": Window(2, 99)}, r"see from key t-2 to the last"),
    "hole": (H100, {"mask": Causal() & Window(-2, 0)}, r"see from key t\+2 to t"),
    "bottom": (H100, {"mask": Causal(), "q_tokens": Tokens(8, start=3)}, r"see up to key t\+3"),
    "positions": (
        H100,
        {"mask": Causal(), "k_tokens": Tokens(8, pos=np.zeros((1, 8), np.int32))},
        "rows from 0; the keys of this call have own positions",
    ),
    "size_h100": (H100, {"size": 264}, "head sizes up to 256; this call has 264$"),
    "size_a100": (
        A100,
        {"size": 136},
        "up to 128; .* needs compute capability 9.0; this GPU has 8.0",
    ),
    "size_any": (CuDNN(), {"size": 136}, r"pass backend=CuDNN\(capability=\(9, 0\)\)"),
    "t4": (CuDNN((7, 5)), {}, "since compute capability 8.0; this GPU has 7.5"),
    "cuda": (
        CuDNN((9, 0), (13, 1)),
        {},
        r"this is CUDA 13.1. Install jax\[cuda12\], or .*cuda=\(12",
    ),
}


def problem_of(size=64, dtype=jnp.bfloat16, **options):
    x = jnp.zeros((1, 8, 2, size), dtype)
    return check(Call(x, x, x, **options))


@pytest.mark.parametrize("name", WHY)
def test_what_it_cannot_do_is_said_in_words(name):
    backend, options, words = WHY[name]
    assert re.search(words, backend.why_not(problem_of(**options), "cuda") or "can run")


CAN = {
    "half": {"dtype": jnp.float16},
    "size": {"size": 256},
    "window": {"mask": Window(3, 0)},
    "wide_window": {"mask": Causal() & Window(99, 99)},
    "positions_unread": {"q_tokens": Tokens(8, start=3)},
    "moved_alike": {
        "mask": Causal(),
        "q_tokens": Tokens(8, start=3),
        "k_tokens": Tokens(8, start=3),
    },
    "valid": {"mask": Causal() & ValidKeys() & ValidQueries()},
}


@pytest.mark.parametrize("name", CAN)
def test_what_it_can_do(name):
    assert H100.why_not(problem_of(**CAN[name]), "cuda") is None


def test_other_platforms_and_symbolic_sizes():
    problem = problem_of()
    assert H100.why_not(problem, "rocm") == "it needs an NVIDIA GPU; this program is for rocm"
    (t,) = jax.export.symbolic_shape("t")
    x = jax.ShapeDtypeStruct((1, t, 2, 64), jnp.bfloat16)
    assert "has symbols" in explain(Call(x, x, x), platform="cuda")["cudnn"]


def test_the_gpus_of_a_process_are_known(monkeypatch):
    assert cudnn.of_this_process() == (None, None)

    class Client:
        platform_version = "PJRT C API\ncuda 12090"

    class Device:
        client = Client()
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert cudnn.of_this_process() == ((9, 0), (12, 9))
    monkeypatch.setattr(Client, "platform_version", "rocm 60300")
    assert cudnn.of_this_process() == (None, None)


# ---- numbers, by what the calls mean -------------------------------------------------------------


class Interpreted(CuDNN):
    """On any platform what a GPU would take."""

    def why_not(self, problem, platform):
        return super().why_not(problem, "cuda")


class Quick(Interpreted):
    """With a branch beside cuDNN's that compiles in no time."""

    def tiled(self):
        return Reference()


@pytest.fixture
def meaning(monkeypatch):
    """Let the calls be what they mean."""
    monkeypatch.setattr(jax.ffi, "ffi_call", fake_cudnn.ffi_call)


def first(*lengths, size=S):
    return np.arange(size)[None] < np.array(lengths)[:, None]


ROWS, COLUMNS = np.arange(T)[:, None], np.arange(S)[None]
PAST = COLUMNS <= ROWS
HOLES = RANDOM.random((B, S)) < 0.6
SHOWN = RANDOM.random((B, T)) < 0.7
CASES = {
    "full": (Full(), True, {}),
    "causal": (Causal(), PAST, {}),
    "window": (Causal() & Window(4, 3), PAST & (COLUMNS >= ROWS - 4), {}),
    "lengths": (ValidKeys(), first(50, 11)[:, None, None], {"k": first(50, 11)}),
    "nothing": (Causal() & ValidKeys(), PAST & first(9, 0)[:, None, None], {"k": first(9, 0)}),
    "window_past_the_end": (
        ValidKeys() & Window(4, 0),
        PAST & (COLUMNS >= ROWS - 4) & first(20, 7)[:, None, None],
        {"k": first(20, 7)},
    ),
    "holes": (Causal() & ValidKeys(), PAST & HOLES[:, None, None], {"k": HOLES}),
    "queries": (
        ValidQueries() & Causal(),
        PAST & SHOWN[:, None, :, None],
        {"q": SHOWN},
    ),
    "shared_lengths": (ValidKeys(), first(30)[:, None, None], {"k": first(30)}),
    "both": (
        ValidQueries() & ValidKeys(),
        SHOWN[:, None, :, None] & first(53, 2)[:, None, None],
        {"q": SHOWN, "k": first(53, 2)},
    ),
}


def arrays():
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V))
    draws = (np.random.default_rng(i).standard_normal(s) for i, s in enumerate(shapes))
    return [x.astype(ml_dtypes.bfloat16) for x in draws]


def call_of(mask, valid, q, k, v):
    return Call(
        *(q, k, v),
        q_tokens=Tokens(T, valid=valid.get("q")),
        k_tokens=Tokens(S, valid=valid.get("k")),
        mask=mask,
    )


# What counts is the numbers, not how well LLVM writes the loops.
@partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def run(backend, name, d_lse, q, k, v, d_out):
    mask, _, valid = CASES[name]
    output, pull = jax.vjp(lambda *a: attend(call_of(mask, valid, *a), backend), q, k, v)
    return *output, *pull(Output(d_out, jnp.where(jnp.isinf(output.lse), 0, d_lse)))


def results(backend, name, d_lse=None):
    """Return out, lse and the cotangents of q, k and v."""
    d_lse = np.zeros((B, N, T), np.float32) if d_lse is None else d_lse
    return run(backend, name, d_lse, *arrays())


@pytest.mark.usefixtures("meaning")
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_numbers(name, lse):
    assert_right(Quick(), name, lse)


@pytest.mark.usefixtures("meaning")
def test_numbers_by_tiles_where_the_valid_keys_have_holes():
    assert_right(Interpreted(), "holes", True)


def assert_right(backend, name, lse):
    visible = CASES[name][1]
    d_lse = RANDOM.standard_normal((B, N, T)).astype(np.float32) if lse else None
    q, k, v, d_out = arrays()
    out, want_lse, _ = oracles.attention(q, k, v, visible=visible)
    moved = None if d_lse is None else np.where(np.isinf(want_lse), 0, d_lse)
    truth = (out, want_lse, *oracles.gradients(q, k, v, d_out, moved, visible=visible)[:3])
    own, plain = (results(x, name, d_lse) for x in (backend, Reference()))
    for part, got, other, want in zip(("out", "lse", "dq", "dk", "dv"), own, plain, truth):
        allowed = 2 if part in ("out", "lse") else 3
        allowed *= max(oracles.relative_error(other, want), np.finfo(np.float32).eps)
        assert oracles.relative_error(got, want) <= allowed, part


@pytest.mark.usefixtures("meaning")
def test_rows_that_see_nothing_give_and_get_nothing():
    out, lse, dq, dk, dv = results(Quick(), "nothing")
    assert not np.any(np.asarray(out[1])) and np.all(np.isneginf(np.asarray(lse[1])))
    assert not any(np.any(np.asarray(x[1])) for x in (dq, dk, dv))


@pytest.mark.usefixtures("meaning")
def test_vmap_folds_its_axis_into_the_examples():
    mask, _, _ = CASES["nothing"]
    q, k, v, d_out = (jnp.asarray(x) for x in arrays())
    valid = jnp.asarray(np.stack([first(9, 0), first(53, 20)]))

    def gradients(valid, scale):
        def out(q, k, v):
            return attend(call_of(mask, {"k": valid}, q * scale, k, v), Quick()).out

        return jax.vjp(out, q, k, v)[1](d_out)

    single, scales = jax.jit(gradients), jnp.asarray([1, 2, 4], q.dtype)
    over = jax.jit(jax.vmap(jax.vmap(gradients, (None, 0)), (0, None)))(valid, scales)
    for i in range(2):
        for j in range(3):
            one = single(valid[i], scales[j])
            for got, want in zip(over, one):
                oracles.assert_close(got[i, j], want, 0.02 * np.abs(np.asarray(want, float)).max())


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_calls_are_cut_over_devices(kind):
    names = ("data", "model") if kind == "Auto" else ("x", "y")
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = Mesh(devices, names, axis_types=(getattr(AxisType, kind),) * 2)
    place = NamedSharding(mesh, PartitionSpec(names[0], None, names[1]))

    def gradients(q, k, v, d_out):
        out, pull = jax.vjp(lambda *a: attend(Call(*a, mask=Causal())).out, q, k, v)
        return out, pull(d_out)

    x = jax.ShapeDtypeStruct((4, 64, 8, 64), jnp.bfloat16, sharding=place)
    k = jax.ShapeDtypeStruct((4, 64, 4, 64), jnp.bfloat16, sharding=place)
    found = calls(lowered(gradients, x, k, k, x))
    assert len(found) == 2
    for *_, types in found:
        assert types.startswith("(tensor<2x64x2x64xbf16>, tensor<2x64x1x64xbf16>,")
