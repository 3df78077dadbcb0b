"""The Mosaic kernels on the CPU, interpreted: every case of the table, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mha_jax import (
    Call,
    Causal,
    Dense,
    Dropout,
    Full,
    Mask,
    SameSegment,
    Tokens,
    UnsupportedError,
    ValidKeys,
    Window,
    attend,
)
from mha_jax.attention import softmax
from mha_jax.attention.call import Output
from mha_jax.attention.check import check
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.pallas_tpu.patterns import (
    EMPTY,
    FULL,
    Blocks,
    Shape,
    geometry,
    kinds,
    order,
    split,
    visited_pairs,
)
from mha_jax.backends.pallas_tpu.sizes import SIZES, Sizes, of_this_process
from mha_jax.backends.pallas_tpu.view import Part, parts
from tests import oracles
from tests.cases import CASES, Case
from tests.test_backends import BACKWARD, FORWARD, errors, truth


def interpreted(blocks):
    """Return the kernels with these tiles in both passes."""
    memory = {"vmem": 2**24, "resident": 2**24, "outer_resident": 2**24}
    return PallasTPU(Sizes((blocks,), (blocks,), **memory), interpret=True)


SMALL = interpreted(Blocks(rows=128, columns=128, full=(2, 1), resident=256))
# Tiles of several grains, part of which are computed, and of several parts.
COARSE = interpreted(Blocks(rows=256, columns=256, full=(2, 1), sweep=(128, 128), grain=128))
# Uninitialised memory is NaN, and reads and writes that race are errors.
STRICT = dataclasses.replace(
    SMALL, interpret=pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
)
NAMES = {case.name: case for case in CASES}


def both_passes(backend, call, d_out, d_lse):
    state = backend.forward(call)
    output = Output(state.out, softmax.logsumexp(state.m, state.l))
    d_lse = jnp.where(jnp.isinf(output.lse), 0, d_lse)
    return output, backend.cotangent(call, state, Output(d_out, d_lse))


def run(backend, case, dtype=np.float32):
    """Return out, lse and the four gradients of a case."""
    call = check(case.call(dtype))
    arguments = (call, *(jnp.asarray(a) for a in case.arrays(dtype)[-2:]))
    if backend.interpret is STRICT.interpret:
        return both_passes(backend, *arguments)
    compiled = jax.jit(lambda *a: both_passes(backend, *a)).lower(*arguments)
    return compiled.compile(compiler_options={"xla_backend_optimization_level": 0})(*arguments)


def errors_of(result, case, dtype=np.float32):
    (out, lse), grads = result
    (want_out, want_lse), want_grads = truth(case, dtype)
    pairs = {"out": (out, want_out), "lse": (lse, want_lse)}
    pairs |= {f"d{key}": (getattr(grads, key), want) for key, want in want_grads.items()}
    return {key: oracles.relative_error(*pair) for key, pair in pairs.items()}


def assert_as_good_as_reference(own, case):
    plain = errors("reference", case, np.float32)
    epsilon = np.finfo(np.float32).eps
    lse = truth(case, np.float32)[0][1]
    own_lse = np.abs(lse[np.isfinite(lse)]).max(initial=0.0)
    for key in own:
        forward = key in ("out", "lse")
        allowed = max((FORWARD if forward else BACKWARD) * plain[key], epsilon)
        if not forward:
            # Logits computed again, in a transposed tile, are rounded otherwise: epsilon times their size.
            allowed = max(allowed, epsilon * own_lse)
        assert own[key] <= allowed, f"{case.name} {key}: {own[key]:.3g}, reference {plain[key]:.3g}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_agree_with_the_oracle(case):
    assert_as_good_as_reference(errors_of(run(SMALL, case), case), case)


@pytest.mark.parametrize(
    "name", ["full", "valid_both_causal", "packed_causal", "dense_per_head_dropout", "bias_shared"]
)
def test_kernels_read_nothing_uninitialised_and_do_not_race(name):
    assert_as_good_as_reference(errors_of(run(STRICT, NAMES[name]), NAMES[name]), NAMES[name])


def test_the_interpreter_runs_inside_jit():
    call = NAMES["causal"].call()

    def loss(qkv, backend):
        out, lse = attend(dataclasses.replace(call, **qkv), backend)
        return jnp.sum(out**2) + jnp.sum(lse**2)

    qkv = {name: getattr(call, name) for name in "qkv"}
    inside = jax.jit(jax.value_and_grad(loss), static_argnums=1)(qkv, STRICT)
    outside = jax.value_and_grad(loss)(qkv, SMALL)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *(inside, outside)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_what_the_rounding_of_large_logits_loses_is_in_every_gradient(bias):
    """Keys alike: weights are 1 / S, and their shift, logit + log(S), has a last bit of 1/16."""
    t, s, size = 37, 53, 5
    r = np.random.default_rng(1)
    q, d_out = (r.standard_normal((1, t, 1, size)).astype(np.float32) for _ in range(2))
    k = np.broadcast_to(
        np.float32(1e6) * r.standard_normal(size).astype(np.float32), (1, s, 1, size)
    )
    v = 1 + r.standard_normal((1, s, 1, size)).astype(np.float32)
    b = np.zeros((1, 1, t, s), np.float32)

    def run(q, v, b):
        call = Call(q, jnp.asarray(k), v, bias=b if bias else None)
        return attend(call, SMALL).out

    dq, dv, db = jax.jit(lambda *a: jax.vjp(run, *a)[1](jnp.asarray(d_out)))(q, v, b)
    dp = np.einsum("btnv,bsnv->ts", d_out.astype(np.float64), v)
    ds = (dp - dp.mean(1, keepdims=True)) / s
    large = np.abs(dp / s).sum(1).max() * np.abs(k).max() * size**-0.5
    np.testing.assert_allclose(dq, 0, atol=1e-5 * large)
    each = np.broadcast_to(d_out.sum(1, keepdims=True) / s, v.shape)
    np.testing.assert_allclose(dv, each, rtol=1e-5, atol=1e-6)
    if bias:
        np.testing.assert_allclose(db[0, 0], ds, atol=1e-6)


LONG_T, LONG_S = 389, 641
_rows, _columns = np.arange(LONG_T)[:, None], np.arange(LONG_S)[None]
_q_ids = np.repeat([0, 1, 2], [100, 200, 89])[None].repeat(2, 0).astype(np.int32)
_k_ids = np.repeat([0, 1, -1], [300, 250, 91])[None].repeat(2, 0).astype(np.int32)
_valid = np.arange(LONG_S)[None] < np.array([[130], [512]])


def long_case(name, mask, visible, **options):
    """Return a case of several blocks of rows, units and resident chunks."""
    return Case(
        name, mask, visible, heads=(2, 1), lengths=(LONG_T, LONG_S), sizes=(11, 5), **options
    )


LONG = [
    long_case("full", Full(), True),
    long_case("causal", Causal(), _columns <= _rows, rate=0.2),
    long_case("window", Window(150, 3), (_columns >= _rows - 150) & (_columns <= _rows + 3)),
    long_case(
        "segments",
        SameSegment(),
        (_q_ids[:, None, :, None] == _k_ids[:, None, None]) & (_k_ids >= 0)[:, None, None],
        q_tokens=lambda: Tokens(LONG_T, segment=_q_ids),
        k_tokens=lambda: Tokens(LONG_S, segment=_k_ids),
    ),
    long_case(
        "lengths",
        ValidKeys(),
        _valid[:, None, None],
        k_tokens=lambda: Tokens(LONG_S, valid=_valid),
        bias=(1, 1, 1, LONG_S),
    ),
    long_case("bias", Causal(), _columns <= _rows, bias=(1, 2, LONG_T, LONG_S)),
    long_case("bias_by_query", Full(), True, bias=(2, 1, LONG_T, 1)),
]


@pytest.mark.parametrize("backend", [SMALL, COARSE], ids=["small", "coarse"])
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_many_tiles_agree_with_the_oracle(case, backend):
    own = errors_of(run(backend, case), case)
    assert max(own.values()) <= 8 * np.finfo(np.float32).eps, own


def test_parts_read_nothing_uninitialised_and_do_not_race():
    strict = dataclasses.replace(COARSE, interpret=STRICT.interpret)
    case = next(case for case in LONG if case.name == "causal")
    own = errors_of(run(strict, case), case)
    assert max(own.values()) <= 8 * np.finfo(np.float32).eps, own


@pytest.mark.parametrize("case", [NAMES["causal"], NAMES["soft_cap"]], ids=lambda case: case.name)
def test_bfloat16_is_rounded_once_or_twice(case):
    (out, lse), _ = run(SMALL, case, jnp.bfloat16)
    q, k, v, options = case.plain(jnp.bfloat16)
    want_out, want_lse, _ = oracles.attention(q, k, v, **options)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    # Two units in the last place of bfloat16 (eps 2**-7), at the size of the result.
    oracles.assert_close(out, want_out, 2 * 2.0**-8 * np.abs(want_out).max(), "out")
    oracles.assert_close(lse, want_lse, 1e-5, "lse")


def test_float16_is_computed_in_float32():
    case = NAMES["causal"]
    (out, _), grads = run(SMALL, case, np.float16)
    want, _, _ = oracles.attention(*case.plain(np.float16)[:3], **case.plain(np.float16)[3])
    assert out.dtype == grads.q.dtype == jnp.float16
    oracles.assert_close(out, want, 2.0**-10 * np.abs(want).max(), "out")


def test_it_maps_over_a_batch():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 150, 2, 4)), jnp.float32)
    length = jnp.asarray([150, 7, 90])

    def one(x, length):
        tokens = Tokens(150, valid=(jnp.arange(150) < length)[None])
        return SMALL.forward(check(Call(x, x, x, tokens, tokens, ValidKeys() & Causal()))).out

    want = jnp.stack([one(*arguments) for arguments in zip(x, length)])
    np.testing.assert_array_equal(jax.vmap(one)(x, length), want)


def test_dropout_bits_are_those_of_the_stream():
    t, s, rate = 150, 270, 0.3
    dropout = Dropout(jax.random.key(3), rate, batch_start=5, head_start=2)
    x = jnp.zeros((1, t, 2, 4))
    value = jnp.broadcast_to(jnp.eye(s)[None, :, None], (1, s, 2, s))
    call = check(Call(x, jnp.zeros((1, s, 2, 4)), value, dropout=dropout))
    out = np.asarray(SMALL.forward(call).out).transpose(0, 2, 1, 3)
    keep = dropout.keep(
        1, 2, np.arange(t, dtype=np.int32)[None], np.arange(s, dtype=np.int32)[None]
    )
    np.testing.assert_array_equal(out > 0, np.asarray(keep))
    np.testing.assert_allclose(out[out > 0], 1 / (s * (1 - rate)), rtol=1e-5)


def test_rows_that_see_nothing_are_exactly_zero():
    (out, lse), grads = run(SMALL, NAMES["nothing"])
    assert not np.asarray(out).any() and np.isneginf(lse).all()
    assert not any(np.asarray(g).any() for g in grads[:3])


def test_what_is_not_valid_reaches_nothing():
    case = NAMES["valid_keys"]
    call = case.call()
    hidden = ~np.asarray(call.k_tokens.valid)[..., None, None]
    spoilt = dataclasses.replace(
        call, k=jnp.where(hidden, jnp.nan, call.k), v=jnp.where(hidden, jnp.inf, call.v)
    )
    got, want = attend(spoilt, SMALL), attend(call, SMALL)
    np.testing.assert_array_equal(got.out, want.out)
    assert np.isfinite(got.out).all()


def test_a_mask_that_the_library_does_not_know_works():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Stripes(Mask):
        """Every third key, counted from the query."""

        def visible(self, q, k):
            return (q.positions - k.positions) % 3 == 0

    case = Case("stripes", Stripes(), (_columns[:, :53] - _rows[:37]) % 3 == 0)
    own = errors_of(run(SMALL, case), case)
    assert max(own.values()) <= 4 * np.finfo(np.float32).eps, own


# ---- which tiles -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 127, 128, 129, 600, 4095, 4096, 5000])
def test_blocks_cover_a_length_with_less_than_a_block_to_spare(length):
    block, count = split(length, 512)
    assert block % 128 == 0 and block <= 512
    assert length <= block * count < length + block


MASKS = [Full(), Causal(), Window(100, 0), Causal() & Window(200, 200), ~Causal(), Window(-1, -1)]


@pytest.mark.parametrize("still", ["q", "k"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: repr(mask))
def test_skipped_grains_are_empty_and_unmasked_ones_are_full(mask, still):
    q, k = jnp.zeros((1, 389, 1, 4)), jnp.zeros((1, 641, 1, 4))
    call = check(Call(q, k, k, mask=mask))
    g = geometry(call, still, Blocks(256, 256, grain=128))
    kind = kinds(call, g)[0, 0]
    seen = np.zeros((g.padded["q"], g.padded["k"]), bool)
    seen[:389, :641] = np.broadcast_to(mask.matrix(Tokens(389), Tokens(641)), (389, 641))
    seen[389:] = seen[388]
    grains = (seen if still == "q" else seen.T).reshape(kind.shape[0], 128, kind.shape[1], 128)
    assert not grains.any((1, 3))[kind == EMPTY].any()
    assert grains.all((1, 3))[kind == FULL].all()


def lists_of(mask, length=4096, blocks=None, **options):
    x = jnp.zeros((1, length, 1, 4))
    call = check(Call(x, x, x, mask=mask, **options))
    g = geometry(call, "q", blocks or Blocks(1024, 1024, full=(2, 1)))
    return call, g, order(call, g)


DIAGONAL = ("P...", "FP..", "FFP.", "FFFP")


def test_a_causal_mask_computes_half_of_the_grains():
    call, g, tiles = lists_of(Causal())
    assert visited_pairs(call, g) == 16 * 17 // 2 * 256**2
    assert [shape.pattern for shape in tiles.shapes] == [DIAGONAL, (), ()]
    assert tiles.counts == (1, None, None) and tiles.fresh


def test_a_window_has_two_patterns():
    _, _, tiles = lists_of(Window(1023, 0))
    assert [shape.pattern for shape in tiles.shapes] == [DIAGONAL, ("PFFF", ".PFF", "..PF", "...P")]


def test_tiles_that_end_with_the_keys_leave_out_what_is_padded():
    _, g, tiles = lists_of(Full(), 4096 - 300)
    assert g.padded["k"] == 4096
    assert [shape.pattern for shape in tiles.shapes] == [("FFP.",) * 4, (), ()]


def test_many_patterns_share_one_program():
    blocks = Blocks(512, 512, full=(2, 1), grain=128)
    call, g, _ = lists_of(Causal() | Window(700, 333), 4096, blocks)
    assert len([shape for shape in order(call, g, most_patterns=9).shapes if shape.pattern]) == 2
    assert len([shape for shape in order(call, g, most_patterns=1).shapes if shape.pattern]) == 1


def test_a_block_that_begins_elsewhere_is_not_fresh():
    assert not lists_of(Window(-257, 9999))[2].fresh
    assert not lists_of(Full())[2].fresh
    assert not lists_of(Causal(), blocks=Blocks(512, 512, resident=1024))[2].fresh


def test_what_only_data_know_is_masked_as_a_whole():
    ids = jnp.arange(4096, dtype=jnp.int32)[None] // 100
    tokens = Tokens(4096, segment=ids)
    _, _, tiles = lists_of(SameSegment(), q_tokens=tokens, k_tokens=tokens)
    assert tiles.shapes[-1].pattern == ("PPPP",) * 4 and tiles.counts == (None,) * 3


def test_a_tile_is_computed_in_parts():
    _, g, _ = lists_of(Causal(), 512, Blocks(512, 512, sweep=(128, 384)))
    assert parts(g, Shape(1), 1024) == [Part(0, 128, 1024, 512), Part(128, 384, 1024, 512)]
    assert parts(g, Shape(1, ("P.", "FP")), 1024) == [
        Part(0, 256, 1024, 256, "P"),
        Part(256, 256, 1024, 512, "FP"),
    ]
    assert parts(g, Shape(1, (".F", "..")), 0, True) == [Part(0, 256, 256, 256, "", True)]
    assert parts(g, Shape(1, ("PP", "PP")), 0) == [Part(0, 512, 0, 512, "PP")]


def test_lists_are_shared_where_scalar_memory_is_short():
    x = jnp.zeros((3, 512, 1, 4))
    ids = np.arange(3 * 512, dtype=np.int32).reshape(3, 512) // 100
    tokens = Tokens(512, segment=ids)
    call = check(Call(x, x, x, tokens, tokens, mask=SameSegment()))
    g = geometry(call, "q", Blocks(128, 128))
    assert order(call, g).groups == (3, 1)
    assert order(call, g, most_words=10).groups == (1, 1)


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e", "tpu7x"])
def test_tall_tiles_are_taken_where_data_decide_nothing(kind):
    x = jnp.zeros((1, 4096, 1, 4), jnp.bfloat16)
    tokens = Tokens(4096, valid=jnp.ones((1, 4096), bool))
    for mask in (Full(), Causal(), Window(1023, 0)):
        assert SIZES[kind].lay(check(Call(x, x, x, mask=mask)), "q").rows == 1024
    assert SIZES[kind].lay(check(Call(x, x, x, tokens, tokens, ValidKeys())), "q").rows == 512


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e", "tpu7x"])
def test_dropout_is_computed_in_parts_of_its_own(kind):
    x = jnp.zeros((1, 4096, 1, 4), jnp.bfloat16)
    dropout = Dropout(jax.random.key(0), 0.1)
    with_it, without = (check(Call(x, x, x, dropout=d)) for d in (dropout, None))
    sweeps = [SIZES[kind].lay(call, "q").sweep for call in (with_it, without)]
    assert sweeps[0] != sweeps[1] and {sum(sweep) for sweep in sweeps} == {1024}


def test_a_tile_whose_rows_are_not_those_of_the_sweep_is_computed_at_once():
    assert lists_of(Full(), 600, Blocks(512, 512, sweep=(128, 384)))[1].sweep == (384,)


@pytest.mark.parametrize(
    ("length", "resident", "blocks"),
    [(4096, 4096, 8), (4095, 4096, 8), (4096, 2048, 1), (6656, 6656, 1)],
)
def test_rows_are_held_together_where_they_need_no_padding(length, resident, blocks):
    x = jnp.zeros((1, length, 1, 4), jnp.bfloat16)
    call = check(Call(x, x, x))
    g = geometry(call, "q", Blocks(512, 512, resident=resident, outer_resident=4096))
    assert g.blocks == blocks
    assert g.padded["q"] - length < 512


@pytest.mark.parametrize(("resident", "chunks"), [(4096, 1), (4095, 2), (1500, 4), (520, 8)])
def test_a_length_that_fits_is_not_padded_by_its_chunks(resident, chunks):
    x = jnp.zeros((1, 4096, 1, 4), jnp.bfloat16)
    g = geometry(check(Call(x, x, x)), "q", Blocks(512, 512, resident=resident))
    assert (g.chunks, g.padded["k"]) == (chunks, 4096)


def test_tall_tiles_are_not_taken_where_memory_is_short():
    x = jnp.zeros((1, 4096, 1, 4), jnp.bfloat16)
    seen = Dense(jnp.ones((1, 1, 4096, 4096), bool))
    assert SIZES["v6e"].lay(check(Call(x, x, x, mask=seen)), "q").rows == 512
    assert SIZES["v6e"].lay(check(Call(*[x.astype(jnp.float32)] * 3)), "q").rows == 512


def test_a_process_without_a_tpu_compiles_for_the_smallest():
    assert of_this_process() == SIZES["v4"]


# ---- what it cannot do -------------------------------------------------------------------------


def test_a_process_without_a_tpu_says_so():
    x = jnp.zeros((1, 4, 1, 4))
    with pytest.raises(UnsupportedError, match="it needs a TPU; this program is for cpu"):
        attend(Call(x, x, x), PallasTPU())


def test_float64_says_so(x64):
    x = jnp.zeros((1, 4, 1, 4), jnp.float64)
    with pytest.raises(UnsupportedError, match="TPUs have no float64; cast q, k and v"):
        attend(Call(x, x, x), SMALL)


def test_a_shared_dense_mask_is_not_repeated():
    seen = Dense(jnp.ones((1, 1, 37, 53), bool))
    case = Case("dense", seen, True)
    assert max(errors_of(run(SMALL, case), case).values()) <= 4 * np.finfo(np.float32).eps
