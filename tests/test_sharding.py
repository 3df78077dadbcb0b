"""On eight devices: no gather, the numbers and the dropout bits of one device."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mha_jax as mj
from mha_jax import (
    Call,
    Causal,
    Dense,
    Dropout,
    MultiHeadAttention,
    SameSegment,
    Tokens,
    UnsupportedError,
    ValidKeys,
    attend,
    explain,
    init_params,
    multi_head_attention,
)
from mha_jax.backends.reference import Reference
from mha_jax.sharding import Sharded, logical_axes, partition_specs, with_logical_names

P = PartitionSpec
B, T, S, N, H, V = 8, 13, 17, 8, 5, 3
BOTH, BATCH, HEADS = ("x", "y"), (("x", "y"), None), (None, ("x", "y"))


@pytest.fixture(scope="module")
def mesh():
    # Names that say nothing: what is cut is read off the arrays.
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))


# The arrays are small: what counts is how a program is cut, not how well LLVM writes its loops.
jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def flags(seed, *shape):
    return np.random.default_rng(seed).random(shape) < 0.7


def arrays(kv=N, bias=None):
    given = {
        "q": numbers(0, B, T, N, H),
        "k": numbers(1, B, S, kv, H),
        "v": numbers(2, B, S, kv, V),
    }
    return given if bias is None else {**given, "bias": numbers(3, *bias)}


def packed(**_):
    ids = np.sort(np.random.default_rng(4).integers(-1, 3, (B, S)), -1).astype(np.int32)
    return {
        "mask": SameSegment(),
        "q_tokens": Tokens(T, segment=jnp.asarray(ids[:, :T])),
        "k_tokens": Tokens(S, segment=jnp.asarray(ids)),
    }


def dropped(rate=0.3):
    return Dropout(jax.random.key(7), rate)


# name: (placement of batch and heads, arrays, what else the call has)
CASES = {
    "causal_dropout": (BOTH, {}, {"mask": Causal(), "dropout": dropped()}),
    "key_padding": (BATCH, {}, {"mask": ValidKeys(), "k_tokens": Tokens(S, valid=flags(5, B, S))}),
    "segments": (BOTH, {}, packed()),
    "dense_per_head": (HEADS, {}, {"mask": Dense(flags(6, 1, N, T, S)), "dropout": dropped()}),
    "dense_per_example": (BOTH, {}, {"mask": Dense(flags(7, B, 1, T, S))}),
    "grouped": (BOTH, {"kv": 4}, {"dropout": dropped()}),
    "grouped_fewer_than_devices": (HEADS, {"kv": 2}, {"dropout": dropped()}),
    "bias": (BOTH, {"bias": (1, N, 1, S)}, {"mask": Causal()}),
    "bias_of_all_heads": (HEADS, {"bias": (1, 1, T, S)}, {}),
}


def both_passes(options):
    def loss(given):
        out, lse = attend(Call(**given, **options))
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), (out, lse)

    return jax.value_and_grad(loss, has_aux=True)


def placed(mesh, given, place):
    batch, heads = place
    count = 1 if heads is None else int(np.prod([mesh.shape[a] for a in heads]))
    keys = heads if given["k"].shape[2] % count == 0 else None
    where = {
        "q": P(batch, None, heads),
        "k": P(batch, None, keys),
        "v": P(batch, None, keys),
        "bias": P(None, heads if "bias" in given and given["bias"].shape[1] > 1 else None),
    }
    return {x: jax.device_put(a, NamedSharding(mesh, where[x])) for x, a in given.items()}


def exchanges(program):
    """Return the kinds of communication in a compiled program."""
    kinds = r" (all-[a-z]+|collective-[a-z]+|reduce-scatter|ragged-[a-z-]+)(?:-start)?\("
    return re.findall(kinds, program.as_text())


def assert_equal_to_rounding(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        a, b = np.asarray(a), np.asarray(b)
        # The same sums of at most 8 parts in another order.
        close = 8 * np.finfo(b.dtype).eps * np.max(np.abs(b), where=np.isfinite(b), initial=1)
        np.testing.assert_allclose(a, b, rtol=0, atol=close)


def run(function, *args):
    program = jit(function).lower(*args).compile()
    return program(*args), program


@pytest.mark.parametrize("name", CASES)
def test_both_passes_on_eight_devices_are_those_of_one(name, mesh):
    place, sizes, options = CASES[name]
    given = arrays(**sizes)
    function = both_passes(options)
    (actual, gradients), program = run(function, placed(mesh, given, place))
    assert set(exchanges(program)) <= {"all-reduce"}
    (_, (out, _)) = actual
    assert np.prod(out.sharding.shard_shape(out.shape)) == out.size / 8
    assert_equal_to_rounding((actual, gradients), jit(function)(given))


@pytest.mark.parametrize("place", [BOTH, BATCH, HEADS])
def test_the_forward_pass_exchanges_nothing(place, mesh):
    options = {"mask": Causal(), "dropout": dropped()}
    given = placed(mesh, arrays(kv=4), place)
    _, program = run(lambda given: attend(Call(**given, **options)), given)
    assert exchanges(program) == []


@pytest.mark.parametrize("place", [BOTH, BATCH, HEADS])
def test_dropout_bits_are_those_of_one_device(place, mesh):
    given = arrays()
    given["v"] = np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None], (B, S, N, S))
    dropout = dropped(0.4)
    (out, _), _ = run(
        lambda given: attend(Call(**given, dropout=dropout)), placed(mesh, given, place)
    )
    rows, columns = np.arange(T, dtype=np.int32)[None], np.arange(S, dtype=np.int32)[None]
    keep = dropout.keep(B, N, rows, columns)
    np.testing.assert_array_equal(np.asarray(out).transpose(0, 2, 1, 3) > 0, keep)


def test_eager_calls_stay_on_their_devices(mesh):
    given = arrays()
    out = attend(Call(**placed(mesh, given, BOTH))).out
    assert out.sharding.spec == P("x", None, "y")
    assert_equal_to_rounding(out, attend(Call(**given)).out)


TRANSFORMED = {
    "jvp": lambda f: lambda given: jax.jvp(f, (given,), (given,))[1],
    "remat": lambda f: lambda given: jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(x)))(given),
    "scan": lambda f: lambda given: jax.lax.scan(lambda c, _: (c, f(given)), 0, None, length=2)[1],
    "vmap": lambda f: jax.vmap(lambda x: f(jax.tree.map(lambda a: a[None], x))),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed_calls_exchange_nothing(name, mesh):
    given = arrays(kv=4)
    function = TRANSFORMED[name](lambda given: attend(Call(**given, dropout=dropped())).out)
    actual, program = run(function, placed(mesh, given, BOTH))
    assert exchanges(program) == []
    assert_equal_to_rounding(actual, jit(function)(given))


def test_explicit_axes_are_read_off_the_types():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    given, options = arrays(kv=4, bias=(1, N, 1, S)), {"dropout": dropped()}
    with jax.set_mesh(mesh):
        actual, program = run(both_passes(options), placed(mesh, given, BOTH))
    # The partitioners of jax 0.7.2 and 0.8.0 gather what lies on Explicit axes; that of 0.10.2 does not.
    gathered = {"all-gather"} if jax.__version_info__ < (0, 10) else set()
    assert set(exchanges(program)) == {"all-reduce"} | gathered
    assert_equal_to_rounding(actual, jit(both_passes(options))(given))


@pytest.mark.parametrize("other", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("kind", ["array", "rule"])
def test_gradients_of_a_bias_that_lies_on_no_mesh(kind, other):
    """Beside arrays that lie on explicit axes: parameters, say, that were made before the mesh."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit, other))
    given = arrays()
    bias = numbers(3, 1, N, T, S) if kind == "array" else mj.biases.Alibi(jnp.ones(N))

    def loss(given, bias):
        return jnp.sum(attend(Call(**given, bias=bias, mask=Causal())).out ** 2)

    def of_each(given, bias):
        """Return the gradients of every example."""
        alone = jax.tree.map(lambda a: a[:, None], given)
        return jax.vmap(jax.grad(loss, 1), (0, None))(alone, bias)

    for function in (jax.grad(loss, 1), of_each):
        want = jit(function)(given, bias)
        with jax.set_mesh(mesh):
            there = placed(mesh, given, (("x",), None))
            for got in (jit(function)(there, bias), function(there, bias)):
                assert_equal_to_rounding(got, want)


@pytest.mark.parametrize("names", [("x", "model"), ("data", "y")])
def test_a_kernel_is_cut_along_auto_axes_beside_explicit_ones(names):
    shapes = []

    class Kernel(Reference):
        """What XLA cannot cut."""

        def forward(self, problem):
            shapes.append(problem.q.shape)
            return super().forward(problem)

        def partitionable(self):
            return None

    kinds = (AxisType.Explicit if len(name) == 1 else AxisType.Auto for name in names)
    mesh = jax.make_mesh((2, 4), names, axis_types=tuple(kinds))
    place = P("x") if "x" in names else P(None, None, "y")
    given = arrays()
    there = {name: jax.device_put(a, NamedSharding(mesh, place)) for name, a in given.items()}
    known = {"batch": ("data",)} if "data" in names else {"heads": ("model",)}
    for backend in (Kernel(), Sharded(Kernel(), **known)):
        actual = jit(lambda given: attend(Call(**given), backend).out)(there)  # noqa: B023
        assert shapes[-1] == (B // 2, T, N // 4, H)
        assert tuple(jax.typeof(actual).sharding.spec)[: len(place)] == tuple(place)
        assert_equal_to_rounding(actual, attend(Call(**given)).out)


@pytest.mark.parametrize(
    "names, says",
    [
        (("x", "model"), "nothing is cut along 'x' (2 devices): neither types nor names say"),
        (("x", "y"), "nothing is cut along 'x' (2 devices), 'y' (4 devices): neither types"),
        (("data", "heads"), None),
    ],
)
def test_explain_names_the_axes_of_unknown_meaning(names, says):
    x = jax.ShapeDtypeStruct((8, 256, 4, 128), jnp.bfloat16)
    with jax.set_mesh(jax.make_mesh((2, 4), names, axis_types=(AxisType.Auto,) * 2)):
        found = explain(Call(x, x, x), "tpu").get("mesh")
        # What is plain XLA may be cut along them, but not by us.
        plain = explain(Call(x, x, x), "cpu").get("mesh")
        named = Sharded(batch=names[:1], heads=names[1:])
        told = explain(Call(x, x, x), "tpu", named)
    if says is None:
        assert found is None and plain is None
        return
    assert found.startswith(says) and "Sharded(batch=('x'," in found
    assert plain == found.replace("nothing is cut along", "XLA cuts as it finds best along")
    assert "mesh" not in told


DOORS = {
    "function": lambda x, backend: mj.dot_product_attention(*[x[:, :, None]] * 3, backend=backend),
    "attend": lambda x, backend: attend(Call(*[x[:, :, None]] * 3), backend).out,
    "linen": lambda x, backend: mj.MultiHeadAttention(1, 2, backend=backend).init_with_output(
        jax.random.key(0), x, x
    )[0],
    "nnx": lambda x, backend: mj.nnx.MultiHeadAttention(
        1, 2, backend=backend, in_features=3, rngs=nnx.Rngs(0)
    )(x, x),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("argument, cut", [("batch", "the batch"), ("heads", "heads")])
def test_names_that_no_axis_of_the_mesh_has_are_refused(argument, cut, door, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x = jax.device_put(jnp.ones((8, 5, 3)), NamedSharding(mesh, P("data")))
    wrong = Sharded(**{argument: ("data", "typo")})
    message = (
        rf"Sharded\({argument}=\('data', 'typo'\)\): there is no axis 'typo' to cut {cut} along. The axes "
        r"here are 'data'. Name one of these\."
    )
    with jax.set_mesh(mesh):
        DOORS[door](x, Sharded(batch=("data",)))
        for way in (lambda f: f, jit):
            with pytest.raises(UnsupportedError, match=message):
                way(lambda x: DOORS[door](x, wrong))(x)
    # Where there is no mesh, no name is wrong.
    assert DOORS[door](jnp.ones((8, 5, 3)), wrong).shape[:2] == (8, 5)


def test_explain_refuses_names_that_no_axis_of_the_mesh_has():
    x = jax.ShapeDtypeStruct((8, 5, 2, 4), jnp.float32)
    with (
        jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))),
        pytest.raises(UnsupportedError, match="there is no axis 'typo' to cut heads along"),
    ):
        explain(Call(x, x, x), "tpu", Sharded(heads=("typo",)))


def test_explain_leaves_out_what_types_speak_of():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit, AxisType.Auto))
    for spec in (P("x"), P()):
        kind = NamedSharding(mesh, spec)
        x = jax.ShapeDtypeStruct((8, 256, 4, 128), jnp.bfloat16, sharding=kind)
        with jax.set_mesh(mesh):
            assert "along 'y' (4 devices):" in explain(Call(x, x, x), "tpu")["mesh"]


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_callers_own_shard_map(check_vma, mesh):
    given = arrays(kv=4, bias=(1, N, 1, S))
    place = {x: P("x", None, "y") for x in "qkv"} | {"bias": P(None, "y")}

    def function(given):
        return tuple(attend(Call(**given, mask=Causal())))

    shards = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(place,),
        out_specs=(P("x", None, "y"), P("x", "y")),
        check_vma=check_vma,
    )

    def loss(function):
        return jax.grad(lambda given: sum(jnp.sum(jnp.sin(x)) for x in function(given)))

    actual, program = run(loss(shards), placed(mesh, given, BOTH))
    assert set(exchanges(program)) == {"all-reduce"}
    assert_equal_to_rounding(actual, jit(loss(function))(given))


def test_a_shard_map_over_a_part_of_the_mesh(mesh):
    given = arrays(kv=4)

    def function(given):
        return attend(Call(**given)).out

    part = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"})
    actual, program = run(part, placed(mesh, given, BOTH))
    assert exchanges(program) == []
    assert_equal_to_rounding(actual, jit(function)(given))


# ---- the layer -----------------------------------------------------------------------------------


def layer_case(mesh):
    x = numbers(8, B, T, 16)
    params = init_params(jax.random.key(0), x, x, num_heads=N, key_dim=4, value_dim=3)
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        partition_specs(params, {"heads": "y"}),
        is_leaf=lambda a: isinstance(a, PartitionSpec),
    )
    there = jax.device_put(params, places), jax.device_put(x, NamedSharding(mesh, P("x")))
    return (params, x), there


def layer(params, x):
    return multi_head_attention(params, x, x, use_causal_mask=True, dropout=dropped())


def test_the_layer_needs_one_sum_after_its_output_projection(mesh):
    here, there = layer_case(mesh)
    actual, program = run(layer, *there)
    assert exchanges(program) == ["all-reduce"]
    assert_equal_to_rounding(actual, jit(layer)(*here))


def test_the_gradient_of_the_layer_gathers_nothing(mesh):
    here, there = layer_case(mesh)
    function = jax.grad(lambda *args: jnp.mean(layer(*args) ** 2), argnums=(0, 1))
    actual, program = run(function, *there)
    assert set(exchanges(program)) == {"all-reduce"}
    assert_equal_to_rounding(actual, jit(function)(*here))


@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("output_shape", [None, (3, 5)])
def test_every_parameter_has_a_name_for_each_axis(kv, output_shape):
    x = jax.ShapeDtypeStruct((2, 5, 16), jnp.float32)
    module = MultiHeadAttention(4, 8, num_kv_heads=kv, output_shape=output_shape, use_gate=True)
    params = jax.eval_shape(module.init, jax.random.key(0), x, x)["params"]
    names = logical_axes({"block": {"attention": params}})["block"]["attention"]
    ranks = jax.tree.map(lambda array, names: len(array.shape) == len(names), params, names)
    assert all(jax.tree.leaves(ranks))
    assert names["query"]["kernel"] == names["gate"]["kernel"] == ("embed", "heads", "kv")
    assert names["key"]["bias"] == ("heads" if kv == 4 else "kv_heads", "kv")
    assert names["attention_output"]["kernel"][:3] == ("heads", "kv", "embed")
    assert names["attention_output"]["bias"][0] == "embed"
    boxed = with_logical_names(params)
    with nn.logical_axis_rules([("heads", "y")]):
        spec = nn.logical_to_mesh(nn.get_partition_spec(boxed))
    assert spec["query"]["kernel"] == P(None, "y", None)


def test_other_arrays_of_a_model_are_not_cut():
    params = {"embedding": jax.ShapeDtypeStruct((7, 16), jnp.float32)}
    assert partition_specs(params, {"embed": "y"}) == {"embedding": P(None, None)}


def test_flax_names_the_axes_of_three_dimensional_kernels():
    draw = nn.with_logical_partitioning(nn.initializers.glorot_uniform(), ("embed", "heads", "kv"))
    module = MultiHeadAttention(4, 8, use_bias=False, kernel_initializer=draw)
    x = jnp.ones((2, 5, 16))
    variables = module.init(jax.random.key(0), x, x)
    kernel = variables["params"]["query"]["kernel"]
    assert len(kernel.names) == kernel.value.ndim
    assert module.apply(variables, x, x).shape == (2, 5, 16)
