"""Rolling caches, caches of eight bits, and caches of stacked layers: what they give, keep and refuse."""

import dataclasses
import functools
import itertools
import re
from functools import cache as once

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from jax import export

import mha_jax as mj
from mha_jax import Cache, Causal, ShapeError, Tokens, UnsupportedError, WeightsError, Window
from mha_jax.engine import by_blocks
from tests import oracles
from tests.drawn import draw, draw_variables

B, T, C, D, N, K, H = 2, 23, 7, 6, 4, 2, 8
WINDOW = 5
X = draw(0, B, T, D)
LAYER = mj.MultiHeadAttention(
    num_heads=N, key_dim=H, num_kv_heads=K, sliding_window=WINDOW, rotary=mj.Rotary()
)
VARIABLES = draw_variables(LAYER, X, X)
CUTS = {"tokens": [1] * T, "chunks": [2, 1, 9, 1, 10], "at_once": [T]}
KINDS = {
    "plain": {"capacity": 29},
    "rolling": {"rolling": True},
    "smallest": {"rolling": True, "capacity": WINDOW},
    "int8": {"dtype": "int8", "capacity": 29},
    "stacked": {"layers": 3, "capacity": 29},
    "all": {"rolling": True, "dtype": "int8", "layers": 3},
}


def empty(name, layer=LAYER, batch=B):
    options = {"capacity": C} | KINDS[name]
    cache = layer.empty_cache(batch, **options)
    return cache.of_layer(1) if "layers" in options else cache


@once
def stepper(**options):
    return jax.jit(
        lambda x, cache, **more: LAYER.apply(
            VARIABLES, x, x, use_causal_mask=True, cache=cache, **options, **more
        )
    )


@once
def whole():
    return np.asarray(LAYER.apply(VARIABLES, X, X, use_causal_mask=True))


def decode(cache, cuts, x=X, step=None):
    outputs, at = [], 0
    for length in cuts:
        y, cache = (step or stepper())(x[:, at : at + length], cache)
        outputs.append(y)
        at += length
    return jnp.concatenate(outputs, 1), cache


def formula(name, x=X):
    """Return (output, scores) of one pass in float64, of keys and values as they are stored."""

    def project(side):
        weights = (np.asarray(VARIABLES["params"][side][part]) for part in ("kernel", "bias"))
        kernel, bias = (np.asarray(part, np.float64) for part in weights)
        return np.einsum("btd,dnh->btnh", np.asarray(x, np.float64), kernel) + bias

    def turned(y):
        return np.asarray(LAYER.rotary(jnp.asarray(y, jnp.float32), np.arange(y.shape[1])), float)

    q, k, v = turned(project("query")), turned(project("key")), project("value")
    if KINDS[name].get("dtype"):
        k, v = dequantised(k), dequantised(v)
    at = np.arange(x.shape[1])
    behind = at[:, None] - at
    out, _, scores = oracles.attention(q, k, v, visible=(behind >= 0) & (behind < WINDOW))
    last = VARIABLES["params"]["attention_output"]
    return np.tensordot(out, np.asarray(last["kernel"], float), 2) + np.asarray(
        last["bias"]
    ), scores


def dequantised(x):
    """Return x in steps of a 127th of the largest number of its token and head."""
    step = np.abs(x).max(-1, keepdims=True) / 127
    from_tie = np.abs(x / step - np.floor(x / step) - 0.5)
    assert from_tie.min() > 127 * 4 * np.finfo(np.float32).eps, (
        "float32 may round it to either side"
    )
    return np.round(x / step) * step


@once
def limit():
    """Return twice the error of float32 in one pass without a cache."""
    return 2 * np.abs(whole() - formula("plain")[0]).max()


def assert_meant(name, got, x=X):
    oracles.assert_close(got, formula(name, x)[0], limit(), name)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", KINDS)
def test_pieces_are_the_whole(name, cuts):
    got, cache = decode(empty(name), CUTS[cuts])
    assert_meant(name, got)
    count = np.asarray(cache.count)
    assert (count[1] if count.ndim == 2 else count).tolist() == [T, T]
    if count.ndim == 2:  # the other layers are as they were
        assert not count[[0, 2]].any() and not np.asarray(cache.keys)[[0, 2]].any()


def test_a_rolling_cache_holds_the_last_tokens_at_their_positions():
    _, cache = decode(empty("rolling"), [T])
    assert cache.oldest.tolist() == [T - C] * B and not cache.overflowed.any()
    positions = np.asarray(cache.tokens.rows)
    assert sorted(positions[0].tolist()) == list(range(T - C, T))
    assert (positions % C == np.arange(C)).all() and np.asarray(cache.held).all()
    assert not np.asarray(empty("rolling").held).any()


@pytest.mark.parametrize("name", ["rolling", "all"])
def test_ragged_rows_roll_as_if_alone(name):
    """Padding anywhere, NaN in it: each row is its own sequence, longer than the capacity."""
    real = np.random.default_rng(1).random((B, T)) < 0.7
    x = jnp.where(real[..., None], X, jnp.nan)
    cache = empty(name)
    got = []
    for a, b in ((0, 9), (9, 10), (10, T)):
        y, cache = stepper()(x[:, a:b], cache, value_mask=real[:, a:b], query_mask=real[:, a:b])
        got.append(y)
    last, cache = stepper()(X[:, :1], cache)
    got = np.concatenate(got, 1)
    for row, kept in enumerate(real):
        alone = np.concatenate([X[row, kept], X[row, :1]])[None]
        assert_meant(name, np.concatenate([got[row, kept], last[row]])[None], alone)


@pytest.mark.parametrize("name", ["rolling", "all"])
def test_scan_and_vmap(name):
    def scanned(x, cache):
        def body(cache, x):
            y, cache = LAYER.apply(
                VARIABLES, x[:, None], x[:, None], use_causal_mask=True, cache=cache
            )
            return cache, y[:, 0]

        return jax.lax.scan(body, cache, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    got = jax.jit(scanned)(X, empty(name))
    assert_meant(name, got)
    alone = jax.tree.map(lambda a: jnp.stack([a] * B), empty(name, batch=1))
    mapped = jax.jit(jax.vmap(scanned))(X[:, None], alone)
    assert_meant(name, mapped[:, 0])


def test_linen_nnx_and_functions():
    arguments = {"use_causal_mask": True, "cache": empty("rolling")}
    other = mj.nnx.MultiHeadAttention.from_linen(LAYER, VARIABLES, rngs=nnx.Rngs(0))
    given = {"sliding_window": WINDOW, "rotary": LAYER.rotary}
    for out, cache in (
        other(X, X, **arguments),
        mj.multi_head_attention(VARIABLES["params"], X, X, **arguments, **given),
    ):
        np.testing.assert_allclose(out, whole(), atol=5e-6)
        assert cache.rolling
    assert other.empty_cache(B, C, rolling=True).rolling


def test_gradients_through_a_rolling_cache_are_those_of_the_whole():
    def loss(x, pieces):
        if not pieces:
            return (LAYER.apply(VARIABLES, x, x, use_causal_mask=True) ** 2).sum()
        return (decode(empty("rolling"), [9, 1, 1, 12], x)[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    want = np.asarray(gradient(X, False))
    oracles.assert_close(gradient(X, True), want, 1e-5 * np.abs(want).max())


def test_dropout_bits_are_those_of_the_whole():
    layer = dataclasses.replace(LAYER, dropout=0.4)
    options = {"training": True, "rngs": {"dropout": jax.random.key(5)}, "use_causal_mask": True}
    run = jax.jit(lambda x, **more: layer.apply(VARIABLES, x, x, **options, **more))
    step = lambda x, cache: run(x, cache=cache)  # noqa: E731
    got, _ = decode(empty("rolling"), [9, 1, 1, 12], step=step)
    np.testing.assert_allclose(got, run(X), atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_rejected_drafts_and_beams(name):
    cache = empty(name) if name != "smallest" else empty("rolling")
    _, held = decode(cache, [8])
    _, drafted = stepper()(X[:, 20:22], held)
    kept = drafted.truncated(8)
    want, after = stepper()(X[:, 8:11], held)
    got, again = stepper()(X[:, 8:11], kept)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(again.count, after.count)
    rows = np.array([1, 0, 1])
    beams, _ = stepper()(X[rows, 8:11], held.reorder(rows))
    np.testing.assert_allclose(beams, np.asarray(want)[rows], atol=1e-6)
    each = drafted.all_layers().truncated(np.array([9, 30]))
    assert np.asarray(each.count).reshape(-1, B).max(0).tolist() == [9, 10]


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_exported(name):
    _, held = decode(empty(name), [6])
    data = serialization.to_bytes(held.all_layers())
    again = serialization.from_bytes(empty(name).all_layers(), data)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(held.all_layers()), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    program = export.export(stepper())(X[:, :1], held).serialize()
    want, cache = stepper()(X[:, :1], held)
    got, other = export.deserialize(bytearray(program)).call(X[:, :1], held)
    np.testing.assert_array_equal(got, want)
    assert isinstance(other, Cache)
    np.testing.assert_array_equal(other.count, cache.count)
    if name == "rolling":
        with pytest.raises(WeightsError, match=r"the saved cache has .*'oldest'.*empty_cache with"):
            serialization.from_bytes(empty("plain"), data)


@pytest.mark.parametrize("name", KINDS)
def test_a_program_closes_over_a_cache_whose_counts_are_known(name):
    _, held = decode(empty(name), [6])
    for cache in (empty(name), held):
        want, after = stepper()(X[:, 6:9], cache)
        got, again = jax.jit(functools.partial(stepper(), cache=cache))(X[:, 6:9])
        np.testing.assert_allclose(got, want, atol=1e-6)
        np.testing.assert_array_equal(again.count, after.count)
    kept = jax.jit(
        lambda x: held.check().truncated(6).reorder(np.array([1])).all_layers().count + x
    )(0)
    assert kept.reshape(-1).max() == 6


@pytest.mark.parametrize("name", KINDS)
def test_a_program_for_chunks_of_any_length(name):
    _, held = decode(empty(name), [6])
    (length,) = export.symbolic_shape("t")
    chunk = jax.ShapeDtypeStruct((B, length, X.shape[-1]), X.dtype)
    program = export.deserialize(export.export(stepper())(chunk, held).serialize())
    for x in (X[:, 6:7], X[:, 6:10]):
        want, after = stepper()(x, held)
        got, again = program.call(x, held)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_array_equal(again.count, after.count)


@pytest.mark.parametrize("name", ["rolling", "int8", "stacked"])
def test_scores_are_over_the_slots(name):
    step = stepper(return_attention_scores=True)
    cache = empty(name)
    if name == "rolling":
        with pytest.raises(ShapeError, match=r"overwrites slots.*capacity 7.*shorter pieces"):
            step(X[:, :4], cache)
    for t in range(9):
        _, scores, cache = step(X[:, t : t + 1], cache)
    _, want = formula(name)
    slots = [t % cache.capacity for t in range(9 - WINDOW, 9)]
    got = np.asarray(scores)[:, :, 0]
    np.testing.assert_allclose(got[..., slots], want[:, :, 8, 9 - WINDOW : 9], atol=2e-6)
    np.testing.assert_allclose(np.asarray(scores).sum(-1), 1, atol=1e-5)


# ---- eight bits -------------------------------------------------------------------------------


def projected(seed=3, length=300, dtype=np.float32):
    return (draw(seed + i, B, length, n, H, dtype=dtype) for i, n in enumerate((N, K, K)))


def stored(cache):
    """Return keys and values of an int8 cache in float64, [B, C, K, H]."""
    sides = (cache.keys, cache.key_scales), (cache.values, cache.value_scales)
    return [
        (np.asarray(n, float) * np.asarray(s, float)[..., None]).swapaxes(1, 2) for n, s in sides
    ]


@pytest.mark.parametrize("numbers", [1, 2**20], ids=["blocks", "one_block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_are_attended_to_as_the_same_numbers_in_float64(dtype, numbers, monkeypatch):
    """Of 300 slots in blocks of 128 the last is short, and those past the count are not read."""
    monkeypatch.setattr(by_blocks, "_NUMBERS", numbers)
    q, k, v = (x.astype(dtype) for x in projected())
    for count in (300, 150, 3):
        cache = Cache.empty(B, 300, K, H, dtype="int8").append(k[:, :count], v[:, :count])
        got, same = mj.dot_product_attention(q[:, :3], None, None, cache=cache)
        wide = [x[:, :count] for x in stored(cache)]
        want, _, _ = oracles.attention(np.asarray(q[:, :3], float), *wide)
        narrow = mj.dot_product_attention(
            q[:, :3].astype(np.float32), *(x.astype(np.float32) for x in wide), backend="reference"
        )
        error = 2 * np.abs(np.asarray(narrow) - want).max()
        error += (dtype == "bfloat16") * float(jnp.finfo(dtype).eps) / 2 * np.abs(want).max()
        assert got.dtype == dtype and same.keys.dtype == jnp.int8
        oracles.assert_close(np.asarray(got, np.float32), want, error, str(count))


def test_eight_bits_are_as_near_as_their_steps():
    """Half a step for a number, that times |q| for a logit, and its exponential for a weight."""
    q, k, v = projected()
    cache = Cache.empty(B, 300, K, H, dtype="int8").append(k, v)
    steps = [np.asarray(s, float).swapaxes(1, 2) for s in (cache.key_scales, cache.value_scales)]
    for got, x, step in zip(stored(cache), (k, v), steps):
        assert (np.abs(got - x) <= step[..., None] * (0.5 + 1e-5)).all()
    got, _ = mj.dot_product_attention(q, None, None, cache=cache)
    want, _, _ = oracles.attention(q, k, v)
    key_step, value_step = (
        np.repeat(step.max(1), N // K, -1)[:, None] for step in steps
    )  # [B, 1, N]
    off = np.abs(q).sum(-1) * H**-0.5 * key_step / 2
    # exp(-2 off) <= new weight / old weight <= exp(2 off)
    bound = value_step / 2 + np.expm1(2 * off) * np.abs(v).max()
    assert (np.abs(np.asarray(got) - want) <= bound[..., None]).all()
    assert bound.max() < np.abs(want).max()


def test_eight_bits_have_no_gradient_and_say_so():
    q, k, v = projected(length=9)

    def loss(q, k):
        cache = Cache.empty(B, 11, K, H, dtype="int8")
        return mj.dot_product_attention(q, k, v, cache=cache)[0].sum()

    assert np.isfinite(np.asarray(jax.grad(loss)(q, k))).all()
    with pytest.raises(UnsupportedError, match=r"int8 have no gradient.*stop_gradient"):
        jax.grad(loss, 1)(q, k)


def test_nothing_as_wide_as_the_cache_is_made():
    cache = Cache.empty(2, 8192, K, 64, dtype="int8")
    q = jnp.ones((2, 1, N, 64))

    def step(q, k, cache):
        return mj.dot_product_attention(q, k, k, cache=cache)

    lowered = jax.jit(step, donate_argnums=2).lower(q, q[:, :, :K], cache)
    used = lowered.compile().memory_analysis()
    assert used.alias_size_in_bytes >= cache.keys.nbytes + cache.values.nbytes
    assert used.temp_size_in_bytes < 4 * cache.keys.nbytes


# ---- stacked layers ---------------------------------------------------------------------------


def test_a_scan_over_layers_copies_no_cache():
    layers, capacity = 5, 2048
    stack = Cache.empty(B, capacity, K, 64, layers=layers)

    def step(x, stack):
        def body(carry, layer):
            x, stack = carry
            y, cache = mj.dot_product_attention(x, x, x, mask=Causal(), cache=stack.of_layer(layer))
            return (y, cache.all_layers()), None

        return jax.lax.scan(body, (x, stack), jnp.arange(layers))[0]

    x = jnp.ones((B, 1, K, 64))
    compiled = jax.jit(step, donate_argnums=1).lower(x, stack).compile()
    used, text = compiled.memory_analysis(), compiled.as_text()
    assert used.alias_size_in_bytes >= stack.keys.nbytes + stack.values.nbytes
    assert used.temp_size_in_bytes < stack.keys.nbytes
    assert not re.findall(rf"f32\[{layers},{B},\S* copy\(", text)
    y, stack = step(x, stack)
    assert stack.count.tolist() == [[1] * B] * layers
    np.testing.assert_allclose(y, x, atol=1e-6)


# ---- by hand ----------------------------------------------------------------------------------


def test_by_hand_it_is_the_whole():
    q, k, v = projected(length=T)
    step = jax.jit(
        lambda q, k, v, cache: mj.dot_product_attention(
            q, k, v, mask=Causal() & Window(4, 0), cache=cache
        )
    )
    want = mj.dot_product_attention(q, k, v, mask=Causal() & Window(4, 0))
    for options in ({"capacity": 29}, {"capacity": C, "rolling": True}):
        cache, parts = Cache.empty(B, num_kv_heads=K, key_dim=H, **options), []
        for a, b in itertools.pairwise([0, 11, 12, 13, T]):
            cut = (x[:, a:b] for x in (q, k, v))
            out, cache = step(*cut, cache)
            parts.append(out)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=2e-6)


def test_by_hand_padding_is_not_stored_nor_felt():
    q, k, v = projected(length=9)
    real = np.arange(9)[None] < np.array([[9], [4]])
    bad = (jnp.where(real[..., None, None], x, jnp.nan) for x in (k, v))
    cache = Cache.empty(B, 11, K, H)
    tokens = Tokens(9, valid=real)
    got, cache = mj.dot_product_attention(q, *bad, key_tokens=tokens, cache=cache)
    assert cache.count.tolist() == [9, 4]
    want = mj.dot_product_attention(q, k, v, mask=mj.ValidKeys(), key_tokens=tokens)
    np.testing.assert_allclose(got, want, atol=2e-6)
    again, same = mj.dot_product_attention(q, None, None, cache=cache)
    np.testing.assert_allclose(again, want, atol=2e-6)
    np.testing.assert_array_equal(same.keys, cache.keys)


def test_by_hand_nothing_is_copied():
    cache = Cache.empty(B, 2048, K, 64)

    def step(q, k, cache):
        return mj.dot_product_attention(q, k, k, mask=Causal(), cache=cache)

    x = jnp.ones((B, 1, K, 64))
    compiled = jax.jit(step, donate_argnums=2).lower(x, x, cache).compile()
    used = compiled.memory_analysis()
    assert used.alias_size_in_bytes >= cache.keys.nbytes + cache.values.nbytes
    assert used.temp_size_in_bytes < cache.keys.nbytes / 2


# ---- what is refused --------------------------------------------------------------------------


def called(cache=None, mask=None, **options):
    q, k, v = projected(length=4)
    cache = Cache.empty(B, C, K, H, rolling=True) if cache is None else cache
    return mj.dot_product_attention(q, k, v, mask=mask, cache=cache, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen(mj.Mask):
    """A rule of a user's that holds an array over keys."""

    keys: jax.Array | np.ndarray

    def visible(self, q, k):
        return self.keys


def drafted():
    step = jax.jit(lambda x, c: mj.dot_product_attention(x, x, x, mask=Window(6, 0), cache=c))
    x = draw(9, B, 9, K, H)
    cache = step(x, Cache.empty(B, C, K, H, rolling=True))[1].truncated(5)
    return called(cache, Window(6, 0))


WRONG = {
    "window": (
        lambda: called(mask=Window(7, 0)),
        r"sees 8 tokens.*capacity 7 holds fewer.*8 or more",
    ),
    "no_window": (
        lambda: called(mask=Causal()),
        r"without a known limit: got Causal.*Window\(6, 0\)",
    ),
    "either": (lambda: called(mask=Causal() | Window(2, 0)), "without a known limit"),
    "no_mask": (lambda: called(), "without a known limit: got Full"),
    "layer_window": (lambda: LAYER.empty_cache(B, 4, rolling=True), r"sees 5 tokens.*capacity 4"),
    "array": (
        lambda: called(mask=Window(2, 0) & np.ones((4, C), bool)),
        "a mask array would be over the slots of a rolling cache",
    ),
    "bias_beside": (
        lambda: called(mask=Window(2, 0), bias=mj.biases.Alibi.of_heads(N) + np.ones((4, C), "f4")),
        "a bias array would be over the slots",
    ),
    "bias": (
        lambda: called(mask=Window(2, 0), bias=np.ones((4, C), np.float32)),
        "a bias array would be over the slots",
    ),
    "draft": (drafted, r"row 0 no longer holds the tokens from 0 on.*oldest is 2, after truncated"),
    "nothing_left": (
        lambda: dataclasses.replace(
            Cache.empty(1, 3, 1, 1, rolling=True), count=jnp.array([9]), oldest=jnp.array([6])
        ).truncated(4),
        r"truncated\(\) to \[4\] tokens leaves nothing.*from \[6\] on",
    ),
    "rolling": (
        lambda: Cache.empty(1, 3, 1, 1, rolling="yes"),
        "rolling must be True or False: got 'yes'",
    ),
    "int4": (
        lambda: Cache.empty(1, 3, 1, 1, dtype="uint8"),
        "dtype must be a floating-point dtype.*or 'int8'.*got 'uint8'",
    ),
    "dtype": (
        lambda: Cache.empty(1, 3, 1, 1, dtype="eight"),
        "dtype must be.*or 'int8'.*got 'eight'",
    ),
    "layers": (
        lambda: Cache.empty(1, 3, 1, 1, layers=0),
        "layers of a cache must be a positive integer",
    ),
    "layer": (
        lambda: Cache.empty(1, 3, 1, 1, layers=2).of_layer(2),
        r"layer must be integers from 0 to 1 of shape \[\]: got values from 2 to 2",
    ),
    "layer_float": (
        lambda: Cache.empty(1, 3, 1, 1, layers=2).of_layer(0.5),
        r"layer must be integers from 0 to 1.*got float32\[\]",
    ),
    "no_layers": (
        lambda: Cache.empty(1, 3, 1, 1).of_layer(0),
        "a cache of one layer has no others",
    ),
    "which_layer": (
        lambda: called(Cache.empty(B, C, K, H, layers=3)),
        r"caches of 3 layers.*cache.of_layer\(i\)",
    ),
    "cache": (lambda: called(3), "cache must be a Cache or None: got int"),
    "past_the_end": (lambda: called(Cache.empty(B, 3, K, H)), "given 4 tokens and holds at most 3"),
    "past_the_end_of_a_layer": (
        lambda: called(called(Cache.empty(B, 5, K, H, layers=2).of_layer(1))[1]),
        "row 0 was given 8 tokens and holds at most 5",
    ),
    "positions": (
        lambda: called(key_tokens=Tokens(4, pos=np.arange(4)[None])),
        r"key_tokens say which are real: got pos for 4 of 4 tokens",
    ),
    "no_tokens": (lambda: called(key_tokens=3), "key_tokens must be Tokens or None: got int"),
    "flax": (
        lambda: called(deterministic=True),
        "Flax's layers pass do not go together.*deterministic",
    ),
    "value": (
        lambda: mj.dot_product_attention(
            X[..., None], X[..., None], None, cache=Cache.empty(B, C, K, H)
        ),
        "key and value are appended together",
    ),
    "rank": (
        lambda: mj.dot_product_attention(X, None, None, cache=Cache.empty(B, C, K, H)),
        r"query is an array \[B, T, N, H\] of one batch axis: got shape \(2, 23, 6\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_right_is_refused(name):
    call, text = WRONG[name]
    with pytest.raises(ShapeError, match=text):
        call()


def test_numbers_of_examples_are_no_arrays_over_slots():
    """PrefixLM's lengths, one for every example."""
    q, k, v = projected(length=9)
    mask = Window(2, 0) & mj.PrefixLM(np.arange(B))
    cache, outs = Cache.empty(B, C, K, H, rolling=True), []
    for i in range(9):
        here = (x[:, i : i + 1] for x in (q, k, v))
        out, cache = mj.dot_product_attention(*here, mask=mask, cache=cache)
        outs.append(out)
    whole = mj.dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=1e-6)


def test_int8_is_refused_for_float64(x64):
    q = draw(1, B, 1, K, H, dtype=np.float64)
    with pytest.raises(
        ShapeError, match=r"holds int8, keys and values are float64.*dtype='float64'"
    ):
        mj.dot_product_attention(q, q, q, cache=Cache.empty(B, C, K, H, dtype="int8"))
    layer = dataclasses.replace(LAYER, param_dtype=jnp.float64)
    with pytest.raises(ShapeError, match="holds int8, keys and values are float64"):
        layer.empty_cache(B, C, dtype="int8")


def test_masks_say_how_far_they_look_back():
    assert Window(4, 2).behind == 4 and Window(-2, 5).behind == 0
    assert (Causal() & Window(3, 9)).behind == 3 and (Window(2, 0) & Window(5, 0)).behind == 2
    assert (Window(2, 0) | Window(5, 0)).behind == 5 and (Window(2, 0) | Causal()).behind is None
    assert mj.ChunkedCausal(8).behind == 7
    assert (~Window(2, 0)).behind is None and Causal().behind is None
