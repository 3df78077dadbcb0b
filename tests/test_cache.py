"""The cache: decoding piece by piece is the full forward pass, in place, and never overwrites."""

import re
from functools import cache as once
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mha_jax as mj
from mha_jax import Cache, ShapeError
from tests.drawn import draw, draw_variables

B, T, C, D, N, H = 2, 7, 11, 6, 4, 3
X = draw(0, B, T, D)
LAYERS = {
    "plain": {},
    "window": {"sliding_window": 3},
    "few_kv_heads": {"num_kv_heads": 2},
    "value_dim_gate": {"value_dim": 5, "use_gate": True, "use_bias": False},
    "all": {"sliding_window": 2, "num_kv_heads": 1, "value_dim": 2, "output_shape": (2, 3)},
}
CHUNKS = {"tokens": [1] * T, "chunks": [4, 1, 1, 1]}
RIGHT = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]], bool)
PADDINGS = {
    "right": RIGHT,
    "left": RIGHT[:, ::-1].copy(),
    "inside": np.array([[1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 0, 0]], bool),
}


def make(**options):
    layer = mj.MultiHeadAttention(num_heads=N, key_dim=H, **options)
    return layer, draw_variables(layer, X, X)


@partial(jax.jit, static_argnums=0, static_argnames="return_attention_scores")
def full(layer, variables, x, **options):
    """Return what one causal call over all tokens gives."""
    return layer.apply(variables, x, x, use_causal_mask=True, **options)


def apply(layer, **options):
    """Return the layer's jitted call; arrays among its keyword arguments are traced."""
    return jax.jit(lambda *inputs, **arrays: layer.apply(*inputs, **arrays, **options))


@once
def causal(layer, **more):
    """Return the jitted step of causal self-attention with a cache; one for all tests of a layer."""
    return jax.jit(
        lambda variables, x, cache, **options: layer.apply(
            variables, x, x, use_causal_mask=True, cache=cache, **more, **options
        )
    )


def decode(step, variables, x, cache, chunks):
    """Pass `x` through chunk by chunk; return the outputs side by side and the cache."""
    outputs, at = [], 0
    for length in chunks:
        y, cache = step(variables, x[:, at : at + length], cache)
        outputs.append(y)
        at += length
    return jnp.concatenate(outputs, axis=1), cache


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", LAYERS)
def test_pieces_are_the_full_forward_pass(name, chunks):
    layer, variables = make(**LAYERS[name])
    want = full(layer, variables, X)
    got, cache = decode(causal(layer), variables, X, layer.empty_cache(B, C), CHUNKS[chunks])
    close(got, want)
    assert cache.count.tolist() == [T, T]
    np.testing.assert_array_equal(cache.keys[:, :, T:], 0)


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_every_backend_reads_it(backend):
    layer, variables = make(backend=backend)
    want = full(layer, variables, X)
    close(decode(causal(layer), variables, X, layer.empty_cache(B, C), [5, 1, 1])[0], want)


@pytest.mark.parametrize("name", ["window", "all"])
def test_rows_of_different_lengths_are_decoded_as_if_alone(name):
    """A prompt padded anywhere, then single tokens: each row is its own sequence."""
    layer, variables = make(**LAYERS[name])
    more = draw(2, B, 2, D)
    step = causal(layer)
    for real in PADDINGS.values():
        prompt, cache = step(variables, X, layer.empty_cache(B, C), value_mask=real)
        assert cache.count.tolist() == real.sum(1).tolist()
        rest, cache = decode(step, variables, more, cache, [1, 1])
        rows = [jnp.concatenate([X[b][real[b]], more[b]]) for b in range(B)]
        alone = jnp.stack([jnp.pad(row, ((0, C - len(row)), (0, 0))) for row in rows])
        want = full(layer, variables, alone)  # causal: what pads the end is not seen
        for b, row in enumerate(rows):
            got = jnp.concatenate([prompt[b][real[b]], rest[b]])
            close(got, want[b, : len(row)])


def test_padding_of_a_causal_prompt_gives_what_the_padded_call_gives():
    layer, variables = make()
    for real in PADDINGS.values():
        masks = {"value_mask": real, "query_mask": real}
        want = full(layer, variables, X, **masks)
        got, _ = causal(layer)(variables, X, layer.empty_cache(B, C), **masks)
        close(got, want)


def test_a_row_may_get_no_token_where_another_gets_one():
    layer, variables = make()
    step = causal(layer)
    _, cache = step(variables, X[:, :3], layer.empty_cache(B, C))
    _, after = step(variables, X[:, 3:4], cache, value_mask=np.array([[True], [False]]))
    assert after.count.tolist() == [4, 3]
    np.testing.assert_array_equal(after.keys[1], cache.keys[1])


def test_memory_is_projected_once():
    """Cross-attention: the first call brings the memory, the others find it in the cache."""
    layer = mj.MultiHeadAttention(num_heads=N, key_dim=H, value_dim=5)
    memory = draw(3, B, 5, D + 1)
    variables = draw_variables(layer, X, memory)
    real = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    run = apply(layer, return_attention_scores=True)
    want, want_scores = run(variables, X, memory, value_mask=real)
    cache = layer.empty_cache(B, 5)
    _, _, cache = run(variables, X[:, :1], memory, value_mask=real, cache=cache)
    got, scores, same = run(variables, X, None, cache=cache)
    close(got, want)
    close(scores, want_scores)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(cache)):
        np.testing.assert_array_equal(a, b)


def test_a_key_of_another_width_without_a_module():
    key = draw(4, B, T, D + 2)
    layer = mj.MultiHeadAttention(num_heads=N, key_dim=H)
    params = draw_variables(layer, X, X, key)["params"]
    call = jax.jit(mj.multi_head_attention)
    want, cache = call(params, X, X, key), Cache.empty(B, T, N, H)
    got, cache = call(params, X, X, key, cache=cache)
    close(got, want)
    close(call(params, X, None, cache=cache)[0], want)


def test_scores_are_over_the_slots():
    layer, variables = make(num_kv_heads=2)
    want, scores = full(layer, variables, X, return_attention_scores=True)
    step = causal(layer, return_attention_scores=True)
    cache, at = layer.empty_cache(B, C), 0
    for length in (5, 1, 1):
        got, late, cache = step(variables, X[:, at : at + length], cache)
        close(got, want[:, at : at + length])
        close(late[..., :T], scores[:, :, at : at + length])
        assert late.shape == (B, N, length, C) and not np.any(late[..., T:])
        at += length


def test_dropout_bits_are_those_of_the_full_pass():
    layer, variables = make(dropout=0.4)
    options = {"training": True, "rngs": {"dropout": jax.random.key(5)}}
    run = apply(layer, use_causal_mask=True, **options)
    step = lambda variables, x, cache: run(variables, x, x, cache=cache)  # noqa: E731
    got, _ = decode(step, variables, X, layer.empty_cache(B, C), [3, 1, 3])
    close(got, run(variables, X, X))


def test_masks_and_tokens_are_over_the_slots():
    layer, variables = make()
    segment = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]], np.int32)
    dense = np.random.default_rng(6).random((B, N, T, T)) < 0.7
    tokens = mj.Tokens(T, segment=segment)
    rule = mj.Causal() & mj.SameSegment()
    run = apply(layer, mask=rule)
    want = run(variables, X, X, query_tokens=tokens, key_tokens=tokens, attention_mask=dense)
    cache = layer.empty_cache(B, C)
    slots = mj.Tokens(C, segment=np.pad(segment, ((0, 0), (0, C - T))))
    wide = np.pad(dense, ((0, 0), (0, 0), (0, 0), (0, C - T)))
    for t in range(T):
        place = np.full((1, 1), t, np.int32)
        y, cache = run(
            variables,
            *(X[:, t : t + 1],) * 2,
            query_tokens=mj.Tokens(1, index=place, segment=segment[:, t : t + 1]),
            key_tokens=slots,
            attention_mask=wide[:, :, t : t + 1],
            cache=cache,
        )
        close(y[:, 0], want[:, t])


def test_slots_that_the_caller_calls_invalid_are_not_seen_nor_is_nan_in_them():
    layer, variables = make()
    valid = np.array([[1, 1, 0, 1, 1, 1, 1]], bool)
    run = apply(layer)
    want = run(variables, X, X, value_mask=np.repeat(valid, B, 0))
    slots = mj.Tokens(C, valid=np.pad(valid, ((0, 0), (0, C - T))))
    bad = X.at[:, 2].set(jnp.nan)
    got, _ = run(variables, X, bad, key_tokens=slots, cache=layer.empty_cache(B, C))
    close(got, want)


def test_batch_axes_and_no_batch_axis():
    layer = mj.MultiHeadAttention(num_heads=N, key_dim=H, attention_axes=-2)
    x = draw(7, 2, 3, T, D)
    variables = draw_variables(layer, x, x)
    want = full(layer, variables, x)
    cache, step = layer.empty_cache(6, C), causal(layer)
    first, cache = step(variables, x[:, :, :4], cache)
    second, cache = step(variables, x[:, :, 4:], cache)
    close(jnp.concatenate([first, second], 2), want)
    close(apply(layer)(variables, x, None, cache=cache)[0], apply(layer)(variables, x, x))
    one, _ = decode(
        lambda v, x, c: causal(layer)(v, x[0], c), variables, x[:1, 0], layer.empty_cache(1, C), [T]
    )
    close(one, want[0, 0])


def test_one_compilation_for_all_steps_and_the_right_answer():
    layer, variables = make()
    x = draw(8, B, 64, D)
    step = causal.__wrapped__(layer)  # whose compilations nobody else adds to
    got, cache = decode(step, variables, x, layer.empty_cache(B, 64), [1] * 64)
    assert step._cache_size() == 1
    close(got, full(layer, variables, x))
    assert not cache.overflowed.any()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (2, 5)])
def test_donated_buffers_are_updated_in_place(batch, length, ragged):
    layer, variables = make(num_kv_heads=2, value_dim=5)
    cache = layer.empty_cache(batch, 1013)

    def step(variables, x, cache, real):
        options = {"value_mask": real} if ragged else {}
        return layer.apply(variables, x, x, use_causal_mask=True, cache=cache, **options)

    lowered = jax.jit(step, donate_argnums=2).lower(
        variables, X[:batch, :length], cache, jnp.ones((batch, length), bool)
    )
    compiled = lowered.compile()
    buffers = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes == buffers
    whole, text = rf"f32\[{batch},2,1013,[35]\]\S* ", compiled.as_text()
    assert len(re.findall(rf"{whole}(scatter|dynamic-update-slice)\(", text)) == 2
    assert not re.findall(rf"{whole}copy\(", text)
    assert not re.findall(rf"f32\[{batch},1013,(2,[35]|6|10)\]", text)  # nothing is turned


def test_scan_carries_it():
    layer, variables = make()

    def body(cache, x):
        y, cache = layer.apply(variables, x[:, None], x[:, None], use_causal_mask=True, cache=cache)
        return cache, y[:, 0]

    _, ys = jax.lax.scan(body, layer.empty_cache(B, T), X.swapaxes(0, 1))
    close(ys.swapaxes(0, 1), full(layer, variables, X))


def test_vmap_over_caches():
    layer, variables = make()
    x = draw(9, 3, B, T, D)
    caches = jax.tree.map(lambda a: jnp.stack([a] * 3), layer.empty_cache(B, C))
    step = jax.vmap(causal(layer), (None, 0, 0))
    first, caches = step(variables, x[:, :, :4], caches)
    second, caches = step(variables, x[:, :, 4:], caches)
    want = jax.vmap(lambda x: full(layer, variables, x))(x)
    close(jnp.concatenate([first, second], 2), want)
    assert caches.count.tolist() == [[T, T]] * 3


@pytest.mark.parametrize("ragged", [False, True])
def test_sharded_rows_and_heads_stay_where_they_are(ragged):
    """Eight devices, rows and heads sharded: the only exchange is the output projection's sum."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    def put(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

    layer = mj.MultiHeadAttention(num_heads=4, key_dim=3)
    x = draw(11, 8, 5, D)
    params = draw_variables(layer, x, x)["params"]
    out = {"attention_output": {"kernel": put(params["attention_output"]["kernel"], "model")}}
    out["attention_output"]["bias"] = put(params["attention_output"]["bias"])
    sharded = out | {
        name: {
            "kernel": put(params[name]["kernel"], None, "model"),
            "bias": put(params[name]["bias"], "model"),
        }
        for name in ("query", "key", "value")
    }
    empty = layer.empty_cache(8, 101)
    keys, values = (put(a, "data", "model") for a in (empty.keys, empty.values))
    cache = Cache(keys, values, put(empty.count, "data"))
    real = np.arange(5)[None] < np.arange(1, 9)[:, None]
    masks = {"value_mask": real} if ragged else {}
    step = causal(layer)
    inputs = ({"params": sharded}, put(x, "data"), cache)
    placed = {name: put(mask, "data") for name, mask in masks.items()}
    text = step.lower(*inputs, **placed).compile().as_text()
    assert not re.findall(r"(all-gather|all-to-all|collective-permute)\(", text)
    got, after = step(*inputs, **placed)
    assert after.keys.sharding.is_equivalent_to(keys.sharding, 4)
    close(got, full(layer, {"params": params}, x, **masks))


def test_gradients_are_those_of_the_full_pass():
    layer, variables = make(num_kv_heads=2, value_dim=5)
    weights = draw(10, B, T, D)

    def whole(variables, x):
        return (full(layer, variables, x) * weights).sum()

    def pieces(variables, x):
        y, _ = decode(causal(layer), variables, x, layer.empty_cache(B, C), [5, 1, 1])
        return (y * weights).sum()

    got = jax.jit(jax.grad(pieces, (0, 1)))(variables, X)
    want = jax.jit(jax.grad(whole, (0, 1)))(variables, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        close(a, b)


def test_nan_in_padding_reaches_neither_output_nor_cache_nor_gradient():
    layer, variables = make()
    real = PADDINGS["inside"]

    @jax.jit
    def run(variables, x):
        def loss(variables, x):
            masks = {"value_mask": real, "query_mask": real}
            y, cache = causal(layer)(variables, x, layer.empty_cache(B, C), **masks)
            return (y**2).sum(), (y, cache)

        return jax.grad(loss, (0, 1), has_aux=True)(variables, x)

    got = run(variables, jnp.where(real[..., None], X, jnp.nan))
    want = run(variables, jnp.where(real[..., None], X, 0))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(a, b)


def test_half_precision():
    dtype = "bfloat16"
    layer, variables = make(dtype=dtype)
    cache = layer.empty_cache(B, C)
    assert cache.keys.dtype == dtype
    want = full(layer, variables, X)
    got, _ = decode(causal(layer), variables, X, cache, [5, 1, 1])
    limit = 4 * jnp.finfo(dtype).eps * np.abs(np.asarray(want, np.float32)).max()
    assert np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max() <= limit


def test_double_precision(x64):
    layer = mj.MultiHeadAttention(num_heads=N, key_dim=H, param_dtype=jnp.float64)
    x = draw(0, B, T, D, dtype=np.float64)
    variables = draw_variables(layer, x, x)
    want = full(layer, variables, x)
    got, cache = decode(causal(layer), variables, x, layer.empty_cache(B, C), [5, 1, 1])
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert cache.count.dtype == jnp.int32


def test_an_activity_regularizer_counts_what_is_projected():
    layer, variables = make(activity_regularizer="l2")
    run = apply(layer, mutable=["losses"])
    _, want = run(variables, X, X)
    (_, cache), got = run(variables, X, X, cache=layer.empty_cache(B, C))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        close(a, b)
    _, kept = run(variables, X, None, cache=cache)
    assert sorted(kept["losses"]) == ["attention_output_activity", "query_activity"]


# Overflow.


def fill(count, capacity=5):
    """Return a cache of two rows that holds `count` distinct tokens in each."""
    chunk = 1.0 + jnp.arange(2 * count * 3, dtype=jnp.float32).reshape(2, count, 1, 3)
    return Cache.empty(2, capacity, 1, 3).append(chunk, chunk), jnp.full((2, 2, 1, 3), -1.0)


def test_an_overflow_is_refused_at_once_where_the_counts_are_known():
    cache, more = fill(4)
    with pytest.raises(ShapeError, match=r"row 0 was given 6 tokens and holds at most 5\."):
        cache.append(more, more)
    one_row = np.array([[True, False], [True, True]])
    with pytest.raises(ShapeError, match=r"row 1 was given 6 tokens"):
        cache.append(more, more, one_row)
    assert cache.append(more, more, one_row[:1]).count.tolist() == [5, 5]
    with pytest.raises(ShapeError, match="was given 8 tokens and holds at most 5"):
        jax.eval_shape(Cache.append, cache, *(jnp.ones((2, 8, 1, 3)),) * 2)


def test_a_traced_overflow_overwrites_nothing_and_stays_visible():
    cache, more = fill(4)
    append = jax.jit(Cache.append)
    full = append(cache, more, more)
    np.testing.assert_array_equal(full.keys[:, :, :4], cache.keys[:, :, :4])
    np.testing.assert_array_equal(full.keys[:, :, 4], -1)
    assert full.count.tolist() == [6, 6] and full.overflowed.all()
    again = append(full, more, more, np.zeros((2, 2), bool))
    again = append(again, *(jnp.full_like(more, 7.0),) * 2)
    np.testing.assert_array_equal(again.keys, full.keys)
    assert again.overflowed.all()
    with pytest.raises(ShapeError, match=r"row 0 was given 8 tokens.*Nothing was overwritten"):
        again.check()


def test_only_the_row_that_overflows_is_flagged():
    cache, more = fill(4)
    after = jax.jit(Cache.append)(cache, more, more, np.array([[True, False], [True, True]]))
    assert after.overflowed.tolist() == [False, True]
    with pytest.raises(ShapeError, match="row 1 was given 6 tokens"):
        after.check()


def test_an_overflow_in_a_loop_is_found_by_checkify():
    cache, more = fill(4)

    def run(cache, steps):
        cache = jax.lax.fori_loop(0, steps, lambda _, c: c.append(more, more), cache)
        return cache.check().count

    checked = jax.jit(checkify.checkify(run))
    error, count = checked(cache, 0)
    error.throw()
    assert count.tolist() == [4, 4]
    error, _ = checked(cache, 3)
    with pytest.raises(
        checkify.JaxRuntimeError, match="row 0 was given 10 tokens and holds at most 5"
    ):
        error.throw()


def test_an_overflow_through_the_layer():
    layer, variables = make()
    cache = layer.empty_cache(B, 5)
    _, cache = layer.apply(variables, X[:, :4], X[:, :4], cache=cache)
    with pytest.raises(ShapeError, match="row 0 was given 6 tokens"):
        layer.apply(variables, X[:, :2], X[:, :2], cache=cache)
    _, after = causal(layer)(variables, X[:, :2], cache)
    assert after.overflowed.all()
    np.testing.assert_array_equal(after.keys[:, :, :4], cache.keys[:, :, :4])


@pytest.mark.parametrize(
    "where",
    [{"start": 3}, {"index": 2 * np.arange(5)[None]}, {"pos": 2 * np.arange(5)[None]}, {}],
    ids=str,
)
def test_keys_are_turned_where_tokens_of_slots_say(where):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
    layer = mj.MultiHeadAttention(2, 4, rotary=mj.Rotary())
    variables = layer.init(jax.random.key(1), x, x)
    tokens = {
        "query_tokens": mj.Tokens(5, pos=3 * np.arange(5)[None]),
        "key_tokens": mj.Tokens(5, **where),
        "use_causal_mask": True,
    }
    want = layer.apply(variables, x, x, **tokens)
    got, _ = layer.apply(variables, x, x, cache=layer.empty_cache(2, 5), **tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)
