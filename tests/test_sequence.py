"""The tokens of one example over several devices: the numbers and the dropout bits of one device."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mha_jax as mj
from mha_jax.backends.blockwise import Blockwise
from mha_jax.backends.sequence import turns
from mha_jax.sharding import Gather, Heads, Ring, Sharded
from tests import oracles
from tests.cases import CASES
from tests.test_backends import BACKWARD, FORWARD, errors, truth
from tests.test_sharding import assert_equal_to_rounding, exchanges, jit

P = PartitionSpec
MESHES = {
    (8,): ("context",),
    (4,): ("context",),
    (3,): ("context",),
    (2, 4): ("data", "seq"),
    (2, 2, 2): ("model", "cp", "data"),
}


def mesh_of(shape, kind=AxisType.Auto):
    names = MESHES[shape]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, devices=devices, axis_types=(kind,) * len(names))


EVERYWHERE = P()


def on(mesh, tree, spec=EVERYWHERE):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)


# ---- every case --------------------------------------------------------------------------------


def run(case, backend, mesh):
    """Return out, lse and the gradients of a case, as one program."""
    call = case.call()
    *_, d_out, d_lse = case.arrays()

    @jit
    def value_and_gradients(arrays):
        def forward(arrays):
            return mj.attend(dataclasses.replace(call, **arrays), backend)

        output, vjp = jax.vjp(forward, arrays)
        d_lse_seen = jnp.where(jnp.isinf(output.lse), 0, jnp.asarray(d_lse))
        return output, vjp(type(output)(jnp.asarray(d_out), d_lse_seen))[0]

    arrays = {name: getattr(call, name) for name in ("q", "k", "v", "bias")}
    return value_and_gradients(on(mesh, {k: a for k, a in arrays.items() if a is not None}))


def check(case, found):
    """Hold what was found to the oracle as strictly as any backend is."""
    (out, lse), gradients = found
    (want_out, want_lse), want = truth(case, np.float32)
    pairs = {"out": (out, want_out), "lse": (lse, want_lse)}
    pairs |= {f"d{key}": (gradients[key], x) for key, x in want.items()}
    plain, epsilon = errors("reference", case, np.float32), np.finfo(np.float32).eps
    for key, pair in pairs.items():
        multiple = FORWARD if key in ("out", "lse") else BACKWARD
        allowed = max(multiple * plain[key], epsilon)
        if key not in ("out", "lse"):
            allowed = max(allowed, epsilon * np.abs(want_lse[np.isfinite(want_lse)]).max(initial=0))
        own = oracles.relative_error(*pair)
        assert own <= allowed, f"{key}: {own:.3g}, reference {plain[key]:.3g}"


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_every_case_by_a_ring(number):
    shape = [(8,), (2, 4), (2, 2, 2)][number % 3]
    check(CASES[number], run(CASES[number], Sharded(strategy="ring"), mesh_of(shape)))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_every_case_gathered(number):
    shape = [(8,), (2, 4), (2, 2, 2)][number % 3]
    check(
        CASES[number], run(CASES[number], Sharded("reference", strategy="gather"), mesh_of(shape))
    )


EVEN = [case for case in CASES if case.heads[1] % 3 == 0]


@pytest.mark.parametrize("case", EVEN, ids=lambda case: case.name)
def test_every_case_by_heads(case):
    check(case, run(case, Sharded("reference", strategy="heads"), mesh_of((3,))))


# ---- what all of them hold ---------------------------------------------------------------------

B, T, S, N, K, H, V = 2, 16, 24, 8, 4, 5, 3
STRATEGIES = {"ring": Ring, "gather": Gather, "heads": Heads}
ALONG = P(None, "context")


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def arrays(t=T, s=S, n=N, k=K):
    return {
        "q": numbers(0, B, t, n, H),
        "k": numbers(1, B, s, k, H),
        "v": numbers(2, B, s, k, V),
        "bias": numbers(3, 1, n, 1, s),
    }


def dropped(rate=0.3):
    return mj.Dropout(jax.random.key(7), rate)


def both_passes(backend=None, **options):
    def loss(given):
        out, lse = mj.attend(mj.Call(**given, **options), backend)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), (out, lse)

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2)])
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_explicit_axes_are_read_off_the_types_and_outputs_keep_them(strategy, shape):
    mesh = mesh_of(shape, AxisType.Explicit)
    batch, heads, length = ("data", "model", "cp") if len(shape) > 1 else (None, None, "context")
    given, options = arrays(n=16, k=8), {"mask": mj.Causal(), "dropout": dropped()}
    where = {x: P(batch, length, heads) for x in "qkv"} | {"bias": P(None, heads, None, length)}
    there = {x: on(mesh, a, where[x]) for x, a in given.items()}
    found, gradients = jit(both_passes(Sharded(strategy=strategy), **options))(there)
    assert jax.typeof(found[1][0]).sharding.spec == jax.typeof(there["q"]).sharding.spec
    for x, a in gradients.items():
        assert jax.typeof(a).sharding.spec == jax.typeof(there[x]).sharding.spec
    assert_equal_to_rounding((found, gradients), jit(both_passes(**options))(given))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_callers_own_shard_map(strategy, check_vma):
    mesh = mesh_of((4,))
    given, options = arrays(), {"mask": mj.Causal(), "dropout": dropped()}
    places = dict.fromkeys("qkv", ALONG) | {"bias": P(None, None, None, "context")}

    def function(backend):
        return lambda given: tuple(mj.attend(mj.Call(**given, **options), backend))

    outs = ALONG, P(None, None, "context")
    shards = jax.shard_map(
        function(STRATEGIES[strategy]("context")),
        mesh=mesh,
        in_specs=(places,),
        out_specs=outs,
        check_vma=check_vma,
    )

    def everything(f):
        def loss(given):
            return sum(jnp.sum(jnp.sin(x)) for x in f(given))

        return lambda given: (
            f(given),
            jax.grad(loss)(given),
            jax.jvp(jax.grad(loss), (given,), (given,))[1],
        )

    *first, second = jit(everything(shards))(given)
    *wanted, wanted_second = jit(everything(function(None)))(given)
    assert_equal_to_rounding(first, wanted)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), second, wanted_second)


# ---- pieces of a ring, biases by rule, sinks, rotary, scores ----------------------------------------


@pytest.mark.parametrize(
    ("pieces", "mask"), [(2, mj.Full()), (3, mj.Causal()), (2, mj.Causal() & mj.Window(5, 0))]
)
def test_keys_that_go_round_in_pieces(pieces, mask):
    """Forward, cotangent and the derivative of both, with dropout and an array bias."""
    given, options = arrays(t=12, s=24), {"mask": mask, "dropout": dropped()}
    places = dict.fromkeys("qkv", ALONG) | {"bias": P(None, None, None, "context")}

    def function(backend):
        return lambda given: tuple(mj.attend(mj.Call(**given, **options), backend))

    shards = jax.shard_map(
        function(Ring("context", pieces=pieces)),
        mesh=mesh_of((4,)),
        in_specs=(places,),
        out_specs=(ALONG, P(None, None, "context")),
        check_vma=False,
    )

    def everything(f):
        def loss(given):
            out, lse = f(given)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

        def moved(given):  # the derivative of both passes, once
            return jax.jvp(jax.grad(loss), (given,), (given,))[1]

        return lambda given: (f(given), jax.grad(loss)(given), moved(given) if pieces == 3 else ())

    *first, second = jit(everything(shards))(given)
    *wanted, wanted_second = jit(everything(function(None)))(given)
    assert_equal_to_rounding(first, wanted)
    assert_close(second, wanted_second)


def assert_close(found, wanted):
    """Hold derivatives of derivatives to those of one device."""
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), found, wanted)


def by_rule(n):
    table = 0.3 * numbers(4, 16, n)
    return mj.biases.Alibi.of_heads(n) + mj.biases.Buckets(table, max_distance=16)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2)], ids=["contiguous", "balanced"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_biases_by_rule(strategy, shape):
    """Each part adds what the rule says of its tokens; gradients of tables are summed over the mesh."""
    length, n = 22, 8
    given = arrays(t=length, s=length, n=n) | {"bias": by_rule(n)}
    options = {"mask": mj.Causal(), "dropout": dropped()}

    def run(backend, y, tokens):
        tokens = {"q_tokens": tokens, "k_tokens": tokens}
        return jit(both_passes(backend, **options, **tokens))(y)

    data, tokens = {x: given[x] for x in "qkv"}, None
    if len(shape) > 1:
        data, tokens = mj.sharding.balanced(data, 1, 4)
    there = on(mesh_of(shape), data) | {"bias": given["bias"]}
    (value, (out, _)), gradients = run(Sharded(strategy=strategy), there, tokens)
    (wanted, (wanted_out, _)), wanted_gradients = run(None, data | {"bias": given["bias"]}, tokens)
    assert_equal_to_rounding((value, out, gradients), (wanted, wanted_out, wanted_gradients))


def test_biases_by_rule_on_explicit_axes_and_in_a_shard_map_and_along_directions():
    length, n = 16, 8
    given = arrays(t=length, s=length, n=n) | {"bias": by_rule(n)}
    wanted = jit(both_passes(mask=mj.Causal()))(given)
    mesh = mesh_of((2, 2, 2), AxisType.Explicit)
    there = on(mesh, {x: given[x] for x in "qkv"}, P("data", "cp", "model"))
    there |= {"bias": on(mesh, given["bias"])}
    assert_equal_to_rounding(jit(both_passes(mask=mj.Causal()))(there)[1], wanted[1])

    def alone(given, backend=None):
        return tuple(mj.attend(mj.Call(**given, mask=mj.Causal()), backend))

    def everything(f):
        def loss(given):
            return sum(jnp.sum(jnp.sin(x)) for x in f(given))

        return lambda given: (
            jax.jvp(f, (given,), (given,)),
            jax.jvp(jax.grad(loss), (given,), (given,)),
        )

    wanted = jit(everything(alone))(given)
    for backend in (Ring("context"), Heads("context")):
        shards = jax.shard_map(
            partial(alone, backend=backend),
            mesh=mesh_of((4,)),
            in_specs=(dict.fromkeys("qkv", ALONG) | {"bias": P()},),
            out_specs=(ALONG, P(None, None, "context")),
        )
        assert_close(jit(everything(shards))(given), wanted)


def test_sinks_and_rotary_and_scores_over_shards():
    """The layer with all of them: output, scores of rows, and what is reduced from scores in O(T)."""
    x = numbers(8, B, 16, 24)
    layer = mj.MultiHeadAttention(
        8, 4, num_kv_heads=4, use_sinks=True, rotary=mj.Rotary(), qk_norm="rms", dropout=0.2
    )
    variables = layer.init(jax.random.key(0), x, x)

    def apply(variables, x, backend=None):
        clone = layer.clone(backend=backend)
        options = {"training": True, "rngs": {"dropout": jax.random.key(1)}}

        def loss(variables):
            return jnp.sum(jnp.sin(clone.apply(variables, x, x, use_causal_mask=True, **options)))

        scores = clone.apply(
            variables, x, x, use_causal_mask=True, return_attention_scores=True, training=False
        )
        return jax.value_and_grad(loss)(variables), scores

    mesh = mesh_of((2, 2, 2))
    there = on(mesh, variables), on(mesh, x, P("data", "cp"))
    found = jit(partial(apply, backend=Sharded(strategy="ring")))(*there)
    wanted = jit(apply)(variables, x)
    assert_close(found, wanted)


@pytest.mark.parametrize("brings", [False, True])
def test_rotary_in_a_shard_map_of_ones_own_turns_by_the_rows_of_the_whole(brings):
    x = numbers(8, B, 16, 24)
    options = {"rotary": mj.Rotary(), "num_kv_heads": 2}
    alone = mj.MultiHeadAttention(4, 8, **options)
    variables = alone.init(jax.random.key(0), x, x)
    layer = alone.clone(backend=Ring("context"))

    def shard(x):
        rows = 4 * jax.lax.axis_index("context") + jnp.arange(4)
        tokens = mj.Tokens(4, index=rows[None]) if brings else None
        tokens = {"query_tokens": tokens, "key_tokens": tokens}
        return layer.apply(variables, x, x, use_causal_mask=True, **tokens)

    shards = jax.shard_map(shard, mesh=mesh_of((4,)), in_specs=ALONG, out_specs=ALONG)
    assert_equal_to_rounding(jit(shards)(x), alone.apply(variables, x, x, use_causal_mask=True))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_layers_decode_from_a_cache_that_is_cut_by_sequence(kind):
    x, sizes = numbers(8, B, 6, 24), {"num_kv_heads": 2, "rotary": mj.Rotary()}
    if kind == "linen":
        layer = mj.MultiHeadAttention(4, 8, **sizes)
        variables = layer.init(jax.random.key(0), x, x)
        step = jit(partial(layer.apply, use_causal_mask=True))
    else:
        layer = mj.nnx.MultiHeadAttention(4, 8, in_features=24, **sizes, rngs=nnx.Rngs(0))
        graph, variables = nnx.split(layer)
        step = jit(
            lambda variables, x, y, cache: nnx.merge(graph, variables)(
                x, y, use_causal_mask=True, cache=cache
            )
        )
    cache = layer.empty_cache(B, 16)
    mesh = mesh_of((8,))

    def cut(a):  # keys and values [B, K, C, H]
        return on(mesh, a, P(None, None, "context") if a.ndim == 4 else P())

    caches = {"one device": cache, "a mesh": jax.tree.map(cut, cache)}
    for t in range(3):
        outs = {}
        for place, held in caches.items():
            given = (variables, x[:, t : t + 1]) if place == "one device" else None
            given = given or on(mesh, (variables, x[:, t : t + 1]))
            outs[place], caches[place] = step(*given, given[1], cache=held)
        assert_equal_to_rounding(outs["a mesh"], outs["one device"])
    assert caches["a mesh"].keys.addressable_shards[0].data.shape[2] == 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_scores_by_rows_and_what_is_reduced_from_them(kind):
    mesh, given = mesh_of((2, 4), kind), arrays(t=13, s=24)
    given["bias"] = by_rule(N)
    there = on(mesh, {x: given[x] for x in "qk"}, P("data"))
    there |= {x: on(mesh, given[x], P("data", "seq")) for x in "kv"}
    there |= {"bias": on(mesh, given["bias"])}

    def reduced(given):
        call = mj.Call(**given, mask=mj.Causal(), dropout=dropped())
        most, keys = mj.scores_top_k(call, 3)
        return (
            mj.attention_scores(call, rows=jnp.array([1, 7, 12])),
            (mj.scores_mean(call), mj.scores_max(call), mj.scores_entropy(call), most),
            keys.astype(jnp.float32),
        )

    assert_equal_to_rounding(jit(reduced)(there), jit(reduced)(given))


@pytest.mark.parametrize("order", ["contiguous", "balanced", "twice"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shards_that_bring_their_tokens_in_any_order(strategy, order):
    """A balanced batch, and one that was reordered once too often, are right; dropout bits exactly."""
    parts, length = 4, 22
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (B, length), -1, 3))
    x, tokens = arrays(t=length, s=length), mj.Tokens(length, segment=ids)
    x.pop("bias")
    options = {"mask": mj.Causal() & mj.SameSegment(), "dropout": dropped()}
    y, moved = x, tokens
    for _ in range(["contiguous", "balanced", "twice"].index(order)):
        y, moved = mj.sharding.balanced(y, 1, parts, moved)

    def forward(y, moved, backend):
        tokens = {"q_tokens": moved, "k_tokens": moved}
        return mj.attend(mj.Call(**y, **tokens, **options), backend).out

    out = jit(partial(forward, backend=Sharded(strategy=strategy)))(on(mesh_of((4,)), y), moved)
    for _ in range(["contiguous", "balanced", "twice"].index(order)):
        out = mj.sharding.restored(out, 1, parts)
    assert_equal_to_rounding(out, jit(partial(forward, backend=None))(x, tokens))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_bits_are_those_of_one_device(strategy):
    length, mesh = 13, mesh_of((2, 4))
    given = arrays(t=length, s=length, n=4)
    given["v"] = jnp.broadcast_to(jnp.eye(length)[None, :, None], (B, length, K, length))
    given.pop("bias")
    out = jit(
        lambda given: mj.attend(mj.Call(**given, dropout=dropped()), Sharded(strategy=strategy)).out
    )(on(mesh, given))
    rows = np.arange(length, dtype=np.int32)[None]
    keep = dropped().keep(B, 4, rows, rows)
    np.testing.assert_array_equal(np.asarray(out).transpose(0, 2, 1, 3) > 0, keep)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hidden_data_that_is_not_a_number_and_rows_that_see_nothing(strategy):
    given = arrays(t=S)
    given.pop("bias")
    valid = jnp.arange(S)[None] < jnp.array([[17], [0]])
    tokens = {"q_tokens": mj.Tokens(S), "k_tokens": mj.Tokens(S, valid=valid)}
    for x in "kv":
        given[x] = jnp.where(valid[..., None, None], given[x], jnp.nan)
    run = jit(both_passes(Sharded(strategy=strategy), mask=mj.ValidKeys(), **tokens))
    (_, (out, lse)), gradients = run(on(mesh_of((2, 4)), given))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((out, gradients)))
    assert not out[1].any() and (lse[1] == -jnp.inf).all() and not gradients["k"][:, 17:].any()


def test_bfloat16_is_as_exact_as_on_one_device():
    given = {x: a.astype(jnp.bfloat16) for x, a in arrays().items()}
    exact = mj.attend(mj.Call(**{x: a.astype(jnp.float32) for x, a in given.items()})).out

    def error(backend, given):
        out = jit(lambda given: mj.attend(mj.Call(**given), backend).out)(given)
        return oracles.relative_error(np.asarray(out, np.float32), np.asarray(exact))

    for strategy in STRATEGIES:
        ours = error(Sharded(strategy=strategy), on(mesh_of((2, 4)), given))
        assert ours <= FORWARD * error("reference", given)


def test_a_step_of_decoding_over_a_cache_that_is_cut_by_sequence():
    mesh = mesh_of((8,))
    given = arrays(t=1, s=64)
    given.pop("bias")
    count = jnp.array([37, 5])
    tokens = {
        "q_tokens": mj.Tokens(1, index=count[:, None] - 1),
        "k_tokens": mj.Tokens(64, valid=jnp.arange(64)[None] < count[:, None]),
    }
    step = both_passes(mask=mj.Causal() & mj.ValidKeys(), dropout=dropped(), **tokens)
    there = {x: on(mesh, a, P() if x == "q" else ALONG) for x, a in given.items()}
    program = jit(step).lower(there).compile()
    assert set(exchanges(program)) == {"all-reduce"}
    assert_equal_to_rounding(program(there), jit(step)(given))


class Kernel(Blockwise):
    """What XLA cannot cut."""

    def partitionable(self):
        return None


@pytest.mark.parametrize("bias", [(8, 1, 1, S), (1, N, 1, S), (1, 1, T, S), (1, 1, T, 1)])
@pytest.mark.parametrize("names", [("data",), ("model",), ("context",)])
def test_gradients_of_a_bias_beside_a_kernel_whatever_is_cut_to_single_entries(bias, names):
    mesh = jax.make_mesh((8,), names, axis_types=(AxisType.Auto,))
    given = {x: numbers(i, 8, n, 8, H) for i, (x, n) in enumerate(zip("qkv", (T, S, S)))}
    given["bias"] = numbers(3, *bias)
    (_, gradients) = jit(both_passes(Sharded(Kernel(), strategy="ring")))(on(mesh, given))
    assert_equal_to_rounding(gradients, jit(both_passes())(given)[1])


# ---- programs ----------------------------------------------------------------------------------


def big(t, n, k, backend, gradient, mask=mj.Causal()):  # noqa: B008
    """Return a program of float32 heads of size 64 over eight devices, and the bytes of a device's q."""
    place = NamedSharding(mesh_of((8,)), ALONG)
    q, k, v = (
        jax.ShapeDtypeStruct((1, t, heads, 64), jnp.float32, sharding=place) for heads in (n, k, k)
    )

    def function(q, k, v):
        def attend(q, k, v):
            return mj.dot_product_attention(q, k, v, mask=mask, backend=backend)

        return jax.vjp(attend, q, k, v)[1](q) if gradient else attend(q, k, v)

    return jit(function).lower(q, k, v).compile(), t // 8 * n * 64 * 4


def test_a_ring_gathers_nothing_and_sends_one_pair_a_turn():
    program, _ = big(512, 8, 8, Sharded(strategy="ring"), gradient=False)
    assert exchanges(program) == ["collective-permute"] * 2
    (body,) = (x for x in program.as_text().split("\n\n") if "collective-permute(" in x)
    assert "conditional(" in body  # the turn's product, in the loop that sends
    program, _ = big(512, 8, 8, Sharded(strategy="ring"), gradient=True)
    # k and v; k and v with their gradients; the gradients' way home.
    assert exchanges(program) == ["collective-permute"] * 8


def test_on_tpus_that_are_not_there_keys_travel_while_the_kernel_runs():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
    from tests.topologies import chips

    mesh = jax.sharding.Mesh(chips("v5e:2x4").reshape(8), ("context",))
    x = jax.ShapeDtypeStruct((1, 2048, 2, 128), jnp.bfloat16, sharding=NamedSharding(mesh, ALONG))

    def function(q, k, v):
        def attend(q, k, v):
            options = {"mask": mj.Causal(), "dropout": dropped()}
            return mj.dot_product_attention(q, k, v, backend=Sharded(strategy="ring"), **options)

        return jax.vjp(attend, q, k, v)[1](q)

    program = jax.jit(function).lower(x, x, x).compile().as_text()
    assert program.count("tpu_custom_call") == 2 and "all-gather" not in program
    kinds = r" (collective-permute-start|collective-permute-done|conditional)\("
    loops = [re.findall(kinds, body) for body in program.split("\n\n") if " conditional(" in body]
    started, done = "collective-permute-start", "collective-permute-done"
    assert sorted(loops, key=len) == [
        [started] * count + ["conditional"] + [done] * count for count in (2, 4)
    ]


@pytest.mark.parametrize(
    ("strategy", "heads", "gradient"),
    [("ring", (8, 8), False), ("ring", (8, 8), True), (None, (8, 8), True), (None, (8, 1), True)],
)
def test_temporaries_of_a_long_sequence_are_under_ten_times_its_queries(strategy, heads, gradient):
    program, own = big(65536, *heads, Sharded(strategy=strategy), gradient)
    assert program.memory_analysis().temp_size_in_bytes < 10 * own


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        (mj.Full(), 8),
        (mj.Causal(), 8),
        (mj.Causal() & mj.Window(8, 0), 2),
        (mj.Window(9, 3), 4),
        (mj.Window(-1, 0) & mj.Window(0, -1), 0),
    ],
)
def test_a_ring_stops_when_no_device_can_see_more(mask, count):
    mesh = mesh_of((8,))

    def attend(q, k, v):
        return mj.dot_product_attention(q, k, v, mask=mask, backend=Ring("context"))

    def cell(i, j):
        tokens = mj.Tokens(8, start=8 * i), mj.Tokens(8, start=8 * j)
        return np.broadcast_to(mask.matrix(*tokens), (8, 8)).any()

    seen = np.array([[cell(i, j) for j in range(8)] for i in range(8)])
    assert turns(seen)[1] == count
    shards = jax.shard_map(attend, mesh=mesh, in_specs=ALONG, out_specs=ALONG)
    x = jax.ShapeDtypeStruct((1, 64, 8, 4), jnp.float32)
    program = jit(shards).lower(x, x, x).compile().as_text()
    trips = re.findall(r'known_trip_count":\{"n":"(\d+)"', program)
    assert trips == [str(count)] * (count > 0)


def test_a_balanced_causal_batch_gives_every_device_equal_work():
    """In tiles that some query of the tile sees, for every device."""
    length, parts, tile = 4096, 8, 64

    def tiles(tokens):
        seen = (
            mj.Causal().matrix(tokens, tokens).reshape(length // tile, tile, length // tile, tile)
        )
        return seen.any((1, 3)).reshape(parts, -1).sum(-1)

    x, tokens = mj.sharding.balanced(np.arange(length), 0, parts)
    np.testing.assert_array_equal(tokens.rows[0], x)
    plain, ours = tiles(mj.Tokens(length)), tiles(tokens)
    assert (plain.min(), plain.max()) == (36, 484)
    assert set(ours) == {260}


@pytest.mark.parametrize("length", [1, 7, 16, 37])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_any_length_is_balanced_and_restored(length, parts):
    x = {"a": jnp.arange(2 * length).reshape(2, length), "b": np.ones((1, length, 3))}
    tokens = mj.Tokens(length, start=5, segment=np.arange(length)[None] // 4)
    y, moved = mj.sharding.balanced(x, 1, parts, tokens)
    np.testing.assert_array_equal(moved.index[0] - 5, y["a"][0])
    np.testing.assert_array_equal(moved.segment[0], y["a"][0] // 4)
    again = mj.sharding.restored(y, 1, parts)
    jax.tree.map(np.testing.assert_array_equal, again, x)


def mapped(backend):
    """Attend example by example, by `jax.vmap`."""

    def one(q, k, v):
        call = mj.Call(q[None], k[None], v[None], mask=mj.Causal())
        return mj.attend(call, backend).out[0]

    return jax.vmap(one)


def plain(backend):
    return lambda q, k, v: mj.attend(mj.Call(q, k, v, mask=mj.Causal()), backend).out


def manual(function, names, spec):
    shape = {"mesh": mesh_of((2, 4)), "in_specs": spec, "out_specs": spec}
    return jax.shard_map(function, axis_names=names, **shape)


RING = Sharded(strategy="ring")
PROGRAMS = {
    "vmap": mapped(RING),
    "vmap over whole heads": mapped(Sharded(strategy="heads")),
    "a shard_map over both axes": manual(mapped(Ring("seq")), {"data", "seq"}, P("data", "seq")),
    "a shard_map over the tokens": manual(plain(Ring("seq")), {"seq"}, P(None, "seq")),
    "a shard_map over the batch": manual(plain(RING), {"data"}, P("data")),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_mapped_and_partly_manual_programs(name):
    given = [numbers(i, 4, 12, 8, H) for i in range(3)]

    def loss(f):
        return lambda *args: jnp.sum(jnp.sin(jax.checkpoint(f)(*args)))

    def both(f):
        return lambda *args: (f(*args), jax.grad(loss(f), (0, 1, 2))(*args))

    found = jit(both(PROGRAMS[name]))(*on(mesh_of((2, 4)), given))
    assert_equal_to_rounding(found, jit(both(plain(None)))(*given))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_layer_on_a_balanced_batch(kind):
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(kind,) * 2)
    x = numbers(8, B, 16, 24)
    layer = mj.MultiHeadAttention(4, 8, num_kv_heads=2, dropout=0.2, training=True)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = layer.init(rngs, x, x)

    def apply(variables, x, tokens=None):
        tokens = {"query_tokens": tokens, "key_tokens": tokens}
        return layer.apply(variables, x, x, use_causal_mask=True, rngs=rngs, **tokens)

    y, tokens = mj.sharding.balanced(on(mesh, x, P("data", "context")), 1, 4)
    out = jit(apply)(on(mesh, variables), y, tokens)
    assert jax.typeof(out).sharding.spec == jax.typeof(y).sharding.spec
    again = mj.sharding.restored(out, -2, 4)
    assert jax.typeof(again).sharding.spec == jax.typeof(y).sharding.spec
    assert_equal_to_rounding(again, jit(apply)(variables, x))


# ---- what is chosen, and what is refused -----------------------------------------------------------


def shapes(kind, heads=(8, 8), t=1024, spec=ALONG):
    place = NamedSharding(mesh_of((8,), kind), spec)
    n, k = heads
    return mj.Call(
        *(jax.ShapeDtypeStruct((1, t, h, 64), jnp.bfloat16, sharding=place) for h in (n, k, k))
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("heads", "mask", "strategy", "start"),
    [
        (
            (32, 4),
            mj.Full(),
            None,
            "gather over 'context', 8 devices: it sends a device 917,504 bytes",
        ),
        ((32, 8), mj.Full(), None, "heads over 'context', 8 devices: it sends a device"),
        ((4, 4), mj.Full(), None, "ring over 'context', 8 devices: it sends a device"),
        ((32, 8), mj.Window(9, 0), None, "ring over 'context', 8 devices: it sends a device"),
        ((32, 8), mj.Full(), "ring", "ring over 'context', 8 devices: it was asked for"),
    ],
)
def test_explain_says_which_strategy_and_why(heads, mask, strategy, start, kind):
    call = dataclasses.replace(shapes(kind, heads), mask=mask)
    with jax.set_mesh(mesh_of((8,), kind)):
        says = mj.explain(call, backend=Sharded(strategy=strategy))["sequence"]
    assert says.startswith(start), says


def test_what_is_not_cut_on_explicit_axes_stays_whole():
    call = shapes(AxisType.Explicit, spec=EVERYWHERE)
    with jax.set_mesh(mesh_of((8,), AxisType.Explicit)):
        assert "sequence" not in mj.explain(call)
        says = mj.explain(call, backend=Sharded(sequence=("context",)))["sequence"]
    assert says.startswith("heads over 'context'")


def in_shard_map(function, *args):
    mesh = mesh_of((4,))
    return jax.shard_map(function, mesh=mesh, in_specs=ALONG, out_specs=ALONG)(*args)


def attended(backend, x=None, **options):
    x = jnp.ones((1, 8, 4, 4)) if x is None else x
    return mj.dot_product_attention(x, x, x, backend=backend, **options)


def on_mesh(backend, **options):
    return attended(backend, on(mesh_of((8,)), jnp.ones((1, 16, 4, 4))), **options)


X = jnp.ones((1, 8, 4, 4))
REFUSED = {
    "no strategy": (lambda: Sharded(strategy="ulysses"), "there is no strategy 'ulysses'"),
    "no names": (
        lambda: Sharded(sequence="context"),
        r"Sharded\(sequence='context'\) names no mesh axes",
    ),
    "no axis": (lambda: Ring(3), r"Ring\(3\) names no mesh axis"),
    "outside": (
        lambda: attended(Ring("context")),
        r"no mesh axis 'context' to talk over here \(axes: none",
    ),
    "another axis": (
        lambda: in_shard_map(lambda x: attended(Ring("cp"), x), X),
        r"no mesh axis 'cp' to talk over here \(axes: 'context'\)",
    ),
    "a name that the mesh does not have": (
        lambda: on_mesh(Sharded(sequence=("contxt",))),
        "there is no axis 'contxt' to cut tokens along. The axes here are 'context'",
    ),
    "an axis that is cut already": (
        lambda: in_shard_map(lambda x: attended(Sharded(sequence=("context",)), x), X),
        r'A jax.shard_map has cut it already: pass backend=mj.sharding.Ring\("context"\)',
    ),
    "heads that cannot be divided": (
        lambda: on_mesh(Sharded(strategy="heads")),
        "4 key-value heads cannot be given to 8 devices evenly",
    ),
    "heads of shards that cannot be divided": (
        lambda: in_shard_map(lambda x: attended(Heads("context"), x), jnp.ones((1, 8, 6, 4))),
        "6 key-value heads cannot be given to 4 devices evenly",
    ),
    "whole rows in parts": (
        lambda: on_mesh(Sharded("reference", strategy="ring")),
        "Reference differentiates whole rows, and here it would see them in parts",
    ),
    "tokens of another shard": (
        lambda: in_shard_map(lambda x: attended(Ring("context"), x, query_tokens=mj.Tokens(8)), X),
        r"query_tokens must describe every token: got Tokens\(length=8\) for 2 tokens",
    ),
    "rows of one side": (
        lambda: in_shard_map(
            lambda x: attended(
                Ring("context"), x, query_tokens=mj.Tokens(2, index=jnp.arange(2)[None])
            ),
            X,
        ),
        "the tokens of the queries bring rows, an index, and those of the keys do not. Pass both",
    ),
    "a mask of one shard": (
        lambda: in_shard_map(
            lambda x: attended(Ring("context"), x, mask=jnp.ones((2, 2), bool)), X
        ),
        r"a mask array or bias \[1, 1, 2, 2\] is over the queries and the keys of one shard",
    ),
    "lengths that differ": (
        lambda: mj.sharding.balanced({"a": np.ones(3), "b": np.ones(4)}, 0, 2),
        r"axis 0 of all arrays is the tokens', of one length: got \[3, 4\]",
    ),
    "no parts": (
        lambda: mj.sharding.restored(np.ones(3), 0, 0),
        "parts must be an integer from 1 to .*: got 0. It is the number of devices",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(name):
    wrong, message = REFUSED[name]
    with pytest.raises((mj.ShapeError, mj.UnsupportedError), match=message):
        wrong()
