"""Every program that JAX can write runs, on every backend, and gives what the plain formula gives."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.experimental.jet import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mha_jax as mj
from mha_jax.backends.blockwise import Blockwise
from mha_jax.engine.mesh import explicit_axes, names_of
from tests.backends import backends, counting, tiles
from tests.programs import NAMES, disabled, hvp, loss, program, under

BACKENDS = {"automatic": None} | backends(
    small_tiles=tiles(4, 4), apart=Blockwise(block_q=4, block_k=4, apart=True)
)
# All are compared with the reference; on CPU the automatic one is blockwise.
COMPARED = sorted(BACKENDS.keys() - {"reference", "blockwise"})
OPTIONS = {
    "plain": {},
    "causal_dropout": {"mask": mj.Causal(), "dropout": mj.Dropout(jax.random.key(5), 0.3)},
    "grouped_bias_cap": {"bias": jnp.linspace(-2, 2, 7).reshape(1, 1, 1, 7), "logit_cap": 3.0},
}
B, T, S, N, K, H, V = 4, 5, 7, 4, 2, 3, 2


def arrays(length=T):
    draw = np.random.default_rng(0).standard_normal
    sizes = (B, length, N, H), (B, S, K, H), (B, S, K, V)
    return tuple(jnp.asarray(draw(size), jnp.float32) for size in sizes)


def attend(backend, options):
    return lambda q, k, v: mj.dot_product_attention(q, k, v, backend=backend, **options)


def mapped(f):
    def one(q, k, v):
        return f(q[None], k[None], v[None])[0]

    return jax.vmap(one)


PROGRAMS = {
    "eager": lambda f: f,
    "jit": lambda f: jax.jit(f),
    "disable_jit": lambda f: disabled(f),
    "disable_jit_grad": lambda f: disabled(jax.grad(loss(f), (0, 1, 2))),
    "grad": lambda f: jax.grad(loss(f), (0, 1, 2)),
    "jit_grad": lambda f: jax.jit(jax.grad(loss(f), (0, 1, 2))),
    "remat": lambda f: jax.jit(jax.grad(loss(jax.checkpoint(f)), (0, 1, 2))),
    "jvp": lambda f: lambda *args: jax.jvp(f, args, args)[1],
    "hvp": lambda f: jax.jit(hvp(f)),
    "debug_nans": lambda f: under(jax.debug_nans(True), jax.jit(jax.grad(loss(f)))),
    "debug_infs": lambda f: under(jax.debug_infs(True), jax.jit(jax.grad(loss(f)))),
    "leaks": lambda f: under(jax.checking_leaks(), jax.jit(jax.grad(loss(f)))),
    "key_reuse": lambda f: under(jax.debug_key_reuse(True), jax.jit(jax.grad(loss(f)))),
    "linearize": lambda f: lambda *args: jax.linearize(f, *args)[1](*args),
    "transpose": lambda f: (
        lambda q, k, v: jax.linear_transpose(lambda v: f(q, k, v), v)(f(q, k, v))
    ),
    "scan": lambda f: lambda *args: jax.lax.scan(lambda c, _: (c, f(*args)), 0, None, length=2)[1],
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_gives_what_the_formula_gives(program, backend, options):
    own = PROGRAMS[program](attend(BACKENDS[backend], OPTIONS[options]))(*arrays())
    wanted = PLAIN.setdefault((program, options), None)
    if wanted is None:
        wanted = PROGRAMS[program](attend("reference", OPTIONS[options]))(*arrays())
        PLAIN[program, options] = wanted
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), own, wanted)


PLAIN: dict = {}


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("name", NAMES)
def test_a_program_of_the_list_runs_on_every_backend(name, backend):
    args = tuple(a[:2, :, :2, :2] for a in arrays(length=3))

    def run(backend):
        return program(name)(attend(BACKENDS[backend], {"mask": mj.Causal()}))(*args)

    if name not in PLAIN:
        PLAIN[name] = run("reference")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
        run(backend),
        PLAIN[name],
    )


def test_the_list_has_a_hundred_programs():
    assert len({*PROGRAMS, *NAMES}) >= 100


@pytest.mark.parametrize("backend", ["blockwise", "apart", "reference"])
def test_vmap_gives_what_the_batch_gives(backend):
    f = attend(BACKENDS[backend], {"mask": mj.Causal()})
    np.testing.assert_allclose(mapped(f)(*arrays()), f(*arrays()), rtol=2e-5, atol=2e-5)


def test_the_series_of_the_function_and_of_the_layer_are_those_of_plain_jax():
    def plain(q, k, v):
        x = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
        x = jnp.where(np.tri(T, S, dtype=bool)[None, None], x, -jnp.inf)
        return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(x), v)

    q, k, v = arrays()
    k, v = (jnp.repeat(x, N // K, 2) for x in (k, v))
    terms = [[jnp.sin(x), jnp.cos(x), x] for x in (q, k, v)]
    for f in (attend(None, {"mask": mj.Causal()}), mapped(attend(None, {"mask": mj.Causal()}))):
        got, want = (jet(g, (q, k, v), terms) for g in (jax.jit(f), plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)

    x = q.reshape(B, T, -1)
    module = mj.MultiHeadAttention(num_heads=2, key_dim=3, dropout=0.5)
    variables = module.init(jax.random.key(0), x, x)
    layer = mj.nnx.MultiHeadAttention.from_linen(module, variables, rngs=nnx.Rngs(0))
    seen = np.arange(B * T).reshape(B, T) % 3 > 0
    functions = {
        "linen": lambda x: module.apply(variables, x, x, query_mask=seen, use_causal_mask=True),
        "nnx": lambda x: layer(x, x, query_mask=seen, use_causal_mask=True, training=False),
    }
    for f in functions.values():
        along = lambda t: f(x + t * jnp.sin(x))  # noqa: B023, E731
        second = jax.jacfwd(jax.jacfwd(along))(0.0)
        _, found = jet(f, (x,), [[jnp.sin(x), jnp.zeros_like(x)]])
        np.testing.assert_allclose(found[1], second, rtol=2e-4, atol=2e-4)


# ---- meshes --------------------------------------------------------------------------------------

E, A = AxisType.Explicit, AxisType.Auto
SPECS = {
    "batch": (P("x"), P("x")),
    "heads": (P(None, None, "x"), P(None, None, "x")),
    "both": (P("y", None, "x"), P("y", None, "x")),
    "unlike": (P("y"), P()),
    "queries": (P("x"), P()),
    "length": (P(None, "x"), P()),
    "size": (P(None, None, None, None), P("y")),
    "replicated": (P(), P()),
}


def explicit_spec(x):
    """Return the explicit mesh axes along every axis of an array; an Auto one may be anywhere."""
    kind = jax.typeof(x).sharding
    return [
        [a for a in axes if a in explicit_axes(kind.mesh)] for axes in names_of(kind.spec, x.ndim)
    ]


@pytest.mark.parametrize("context", [False, True], ids=["no_context", "set_mesh"])
@pytest.mark.parametrize("types", [(E, E), (A, A), (E, A)], ids=["explicit", "auto", "mixed"])
@pytest.mark.parametrize("place", SPECS)
def test_arrays_on_a_mesh(place, types, context):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=types)
    spec = dict(zip("qk", SPECS[place]))
    given = arrays(length=6)
    sides = zip(given, ("q", "k", "k"))
    there = [jax.device_put(a, NamedSharding(mesh, spec[side])) for a, side in sides]
    options = {"mask": mj.Causal(), "dropout": mj.Dropout(jax.random.key(1), 0.4)}
    f = attend(None, options)
    wanted = f(*given), jax.grad(loss(f), (0, 1, 2))(*given)

    def both(*args):
        return f(*args), jax.grad(loss(f), (0, 1, 2))(*args)

    def run():
        eager = f(*there)
        return eager, jax.jit(both)(*there)

    if context:
        with jax.set_mesh(mesh):
            eager, (out, gradients) = run()
    else:
        eager, (out, gradients) = run()
    for got in (eager, out):
        np.testing.assert_allclose(got, wanted[0], rtol=2e-5, atol=2e-5)
    for got, want, primal in zip(gradients, wanted[1], there):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        assert explicit_spec(got) == explicit_spec(primal)
    if place != "size":
        assert explicit_spec(out) == explicit_spec(there[0])


def test_a_mesh_of_one_explicit_device_and_an_hvp_on_explicit_axes():
    for devices in (1, 8):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(E,), devices=jax.devices()[:devices]
        )
        draw = np.random.default_rng(1).standard_normal((3, 8, 5, 2, 3)).astype(np.float32)
        there = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in draw]
        f = attend(None, {"mask": mj.Causal()})
        got = jax.jit(hvp(f))(*there)
        want = hvp(f)(*map(jnp.asarray, draw))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


@pytest.mark.parametrize("around", [False, True])
def test_second_derivatives_in_and_around_a_shard_map(around):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(A,), devices=jax.devices()[:4])
    f = attend(None, {"mask": mj.Causal()})
    want = hvp(f)(*arrays())

    def shards(g):
        return jax.shard_map(g, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

    got = hvp(shards(f))(*arrays()) if around else shards(hvp(f))(*arrays())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


# ---- programs that are kept ----------------------------------------------------------------------


@pytest.mark.parametrize("sizes", ["b, 5, 4, 3", "4, t, 4, 3", "b, t, 4, 3"])
@pytest.mark.parametrize("valid", [False, True])
def test_symbolic_sizes(sizes, valid):
    shape = export.symbolic_shape(sizes)

    def f(x, valid_keys):
        tokens = mj.Tokens(x.shape[1], valid=valid_keys) if valid else None
        mask = mj.Causal() & mj.ValidKeys() if valid else mj.Causal()
        return jnp.sin(
            mj.dot_product_attention(x, x, x, mask=mask, query_tokens=tokens, key_tokens=tokens)
        )

    kinds = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], bool)
    gradient = jax.grad(lambda x, valid_keys: f(x, valid_keys).sum())
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 5, 4, 3)), jnp.float32)
    keys = jnp.asarray(np.random.default_rng(3).random((4, 5)) < 0.7)
    for function in (f, gradient):
        exported = export.export(jax.jit(function))(*kinds)
        again = export.deserialize(exported.serialize())
        np.testing.assert_allclose(again.call(x, keys), function(x, keys), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("platforms", [("cpu", "tpu"), ("tpu", "cpu"), ("cpu", "cuda", "rocm")])
def test_one_export_for_several_platforms(platforms):
    q, k, v = arrays()
    f = attend(None, {"mask": mj.Causal()})
    for function in (f, jax.grad(loss(f), (0, 1, 2))):
        exported = export.export(jax.jit(function), platforms=platforms)(q, k, v)
        got, want = exported.call(q, k, v), function(q, k, v)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def values_with_arrays():
    q, k, v = arrays()
    tokens = mj.Tokens(S, start=3, segment=np.zeros((1, S), np.int32))
    rules = mj.Causal() & ~mj.Window(3, 0) | mj.Dense(np.ones((T, S), bool)) & mj.PrefixLM(3)
    table = jnp.ones((9, N))
    biases = mj.biases.Relative(table, axes=(2, 2)) + mj.biases.Buckets(table, False, 7)
    more = mj.biases.Alibi.of_heads(N) + mj.biases.Array(jnp.ones((T, S)))
    call = mj.Call(q, k, v, k_tokens=tokens, mask=rules, bias=more, scale=0.25, precision="highest")
    dropout = mj.Dropout(jax.random.PRNGKey(0), 0.5)
    return tokens, rules, biases, dropout, call, mj.attend(call), mj.Cache.empty(2, 3, 1, 4)


def test_what_holds_arrays_goes_through_an_exported_program():
    for value in values_with_arrays():
        check_export(value)


def test_numbers_of_numpy_go_through_an_exported_program():
    q, k, v = arrays()
    table = mj.biases.Buckets(jnp.ones((9, N)), np.bool_(False), np.int64(7))
    dropout = mj.Dropout(jax.random.PRNGKey(0), np.float32(0.1))
    for value in (table, dropout, mj.Call(q, k, v, bias=table, scale=np.float32(0.3))):
        check_export(value)


def check_export(value):
    program = export.export(jax.jit(lambda x: x))(value).serialize()
    again = export.deserialize(program).call(value)
    assert jax.tree.structure(again) == jax.tree.structure(jax.tree.map(jnp.asarray, value))
    jax.tree.map(np.testing.assert_array_equal, again, value)


def test_an_exported_call_is_the_call_and_one_with_an_object_is_refused():
    call = values_with_arrays()[4]
    program = export.deserialize(export.export(jax.jit(mj.attend))(call).serialize())
    np.testing.assert_allclose(program.call(call).out, mj.attend(call).out, rtol=2e-5, atol=2e-5)
    other = dataclasses.replace(call, precision=jax.lax.Precision.HIGHEST)
    with pytest.raises(mj.WeightsError, match=r"cannot hold .*HIGHEST.*no number, text or tuple"):
        export.export(jax.jit(mj.attend))(other).serialize()


@pytest.mark.parametrize("platform", ["METAL", "xpu"])
def test_platforms_that_nobody_named_lower(platform):
    x = jax.ShapeDtypeStruct((2, 37, 4, 8), jnp.float32)
    traced = jax.jit(attend(None, {})).trace(x, x, x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text


KEPT = """
import jax, jax.numpy as jnp, mha_jax as mj
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_compilation_cache_dir", {folder!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
hits = []
def listen(name, **_):
    hits.extend([name] if name.endswith("cache_hits") else [])
jax.monitoring.register_event_listener(listen)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
q = jax.device_put(jnp.ones((8, 6, 4, 4)), NamedSharding(mesh, P("data")))
program = jax.jit(lambda q: mj.dot_product_attention(q, q, q)).lower(q).compile()
if not hits:  # what comes from the cache is serialized there already
    again = deserialize_and_load(*serialize(program))
    assert (again(q) == program(q)).all()
print("hits", len(hits))
"""


def test_a_program_for_several_devices_is_kept_and_found_again(tmp_path):
    code = KEPT.format(folder=str(tmp_path))
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, capture_output=True, text=True, env=environment) for _ in range(2)
    ]
    assert not any(run.returncode for run in runs), runs[0].stderr + runs[1].stderr
    assert "hits 0" in runs[0].stdout and "hits 0" not in runs[1].stdout


def test_no_value_of_a_trace_is_kept():
    """What is cached is keyed by sizes and structure, never by values of a trace."""
    key = jax.random.key(0)

    @jax.jit
    def f(x, key, scale):
        return mj.dot_product_attention(x, x, x, scale=scale, dropout=mj.Dropout(key, 0.2))

    x = arrays()[0]
    with jax.checking_leaks():
        first, second = f(x, key, 0.5), f(x, key, 0.25)
    assert not np.allclose(first, second)


# ---- the way of a call ---------------------------------------------------------------------------


def test_a_call_reaches_its_backend_in_few_frames():
    backend, frames = counting(Blockwise)
    mj.dot_product_attention(*arrays(), backend=backend)
    assert frames[0] <= 10
