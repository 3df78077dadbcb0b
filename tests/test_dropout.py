"""Dropout: stream version 1 bit for bit, the same bits on every path, and its statistics.

The statistical bounds are those that a true random stream passes with probability 1 - 1e-4 at least;
keys are fixed, so a test either always passes or shows a pattern.
"""

import math
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import Call, Causal, Dropout, ShapeError, Tokens, attend
from mha_jax.backends.blockwise import Blockwise
from mha_jax.backends.reference import Reference
from tests.backends import backends, tiles

CHANCE = 1e-4
WORD = 2**32


def bits(key=0, rate=0.5, batch=1, heads=1, rows=256, columns=256, **start):
    """Return keep bits [B, N, T, S] as NumPy."""
    dropout = Dropout(jax.random.key(key) if isinstance(key, int) else key, rate, **start)
    rows = np.arange(rows, dtype=np.int32)[None] if isinstance(rows, int) else rows
    return np.asarray(dropout.keep(batch, heads, rows, np.arange(columns, dtype=np.int32)[None]))


# ---- the stream -------------------------------------------------------------------------------


def threefry(key, counter):
    """Threefry-2x32, 20 rounds, in Python integers."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (counter[0] + schedule[0]) % WORD, (counter[1] + schedule[1]) % WORD
    for i in range(20):
        turn = ((13, 15, 26, 6), (17, 29, 16, 24))[i // 4 % 2][i % 4]
        x = (x + y) % WORD
        y = (y << turn | y >> 32 - turn) % WORD ^ x
        if i % 4 == 3:
            x = (x + schedule[(i // 4 + 1) % 3]) % WORD
            y = (y + schedule[(i // 4 + 2) % 3] + i // 4 + 1) % WORD
    return x, y


def keep_by_hand(key, rate, b, n, t, s):
    """Say whether a weight is kept, from the definition of stream version 1."""
    a, c = threefry(threefry(key, (b, n)), (t % WORD, 1))
    x = (a + s * 0x9E3779B9) % WORD
    x = ((x ^ x >> 16) * 0x7FEB352D + c) % WORD
    x = (x ^ x >> 15) * 0x846CA68B % WORD
    return x >= round(rate * WORD)


def test_threefry_is_the_published_one():
    # Known answers of Salmon et al.'s own test set.
    assert threefry((0, 0), (0, 0)) == (0x6B200159, 0x99BA4EFE)
    ones = 0xFFFFFFFF
    assert threefry((ones, ones), (ones, ones)) == (0x1CB996FC, 0xBB002BE7)
    pi = (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)
    assert threefry(*pi) == (0xC4923A9C, 0x483DF7A0)


@pytest.mark.parametrize("words, rate", [((0, 7), 0.5), ((0xDEADBEEF, 0xFFFFFFFF), 0.1)])
def test_the_stream_is_the_one_described(words, rate):
    key = np.array(words, np.uint32)
    rows = np.array([[0, 1, 5, 2**31 - 1, -1]], np.int32)
    got = np.asarray(Dropout(key, rate).keep(2, 3, rows, np.arange(9, dtype=np.int32)[None]))
    for b, n, t, s in np.ndindex(got.shape):
        assert got[b, n, t, s] == keep_by_hand(words, rate, b, n, int(rows[0, t]), s)


# The bits that users have in their runs. If one of these changes, the stream has a new version.
GOLDEN = {
    (0, 0.5): "f92b38979b30fa7bdc858188c0c306b0e4353b1e26553b5eeb923d28419f5653",
    (42, 0.1): "fbdefbfffff97f4fffffefef7dff7ffffff73ffffbbbffbbfefffdffbbffffff",
    (2**31 - 1, 0.9): "210000040100140100082201c000000000400004042004020000000020000000",
}


@pytest.mark.parametrize("key, rate", GOLDEN)
def test_version_1_never_changes(key, rate):
    drawn = bits(key, rate, batch=2, heads=2, rows=4, columns=16)
    assert np.packbits(drawn).tobytes().hex() == GOLDEN[key, rate]


def test_keys_of_every_form():
    typed, raw = bits(jax.random.key(3)), bits(jax.random.PRNGKey(3))
    np.testing.assert_array_equal(typed, raw)
    rbg = [bits(jax.random.key(seed, impl="rbg")) for seed in (3, 4)]
    assert 0.4 < (rbg[0] == rbg[1]).mean() < 0.6


def test_extreme_rates():
    assert bits(rate=0.0).all()
    assert not bits(rate=1 - 2**-20, rows=64, columns=64).any()
    assert Dropout(jax.random.key(0), 1 - 2**-40).threshold == 2**32 - 1


def test_a_higher_rate_drops_more_of_the_same():
    low, high = bits(rate=0.1), bits(rate=0.4)
    assert (low | ~high).all()


# ---- the same bits on every path --------------------------------------------------------------

B, T, S, N, K = 3, 11, 13, 4, 2
RATE = 0.4
BACKENDS = backends(tiles_8_4=tiles(8, 4), tiles_3_5=tiles(3, 5), tiles_1_16=tiles(1, 16))


@partial(jax.jit, static_argnames=("backend", "batch", "heads", "kv_heads", "rows", "causal"))
def kept_by(backend, dropout, batch=B, heads=N, kv_heads=K, rows=T, tokens=None, causal=False):
    """Return the keep bits that a backend used, read off its output [B, N, T, S]."""
    v = jnp.broadcast_to(jnp.eye(S)[None, :, None], (batch, S, kv_heads, S))
    zeros = jnp.zeros((batch, S, kv_heads, 3))
    call = Call(jnp.zeros((batch, rows, heads, 3)), zeros, v, q_tokens=tokens, dropout=dropout)
    if causal:
        call = Call(call.q, zeros, v, mask=Causal(), dropout=dropout)
    return jnp.swapaxes(attend(call, backend).out > 0, 1, 2)


WHOLE = bits(5, RATE, B, N, T, S)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_and_tile_size_has_the_same_bits(name):
    dropout = Dropout(jax.random.key(5), RATE)
    kept = kept_by(BACKENDS[name], dropout)
    np.testing.assert_array_equal(kept, WHOLE)


@pytest.mark.parametrize("name", ["reference", "tiles_3_5"])
def test_a_mask_changes_no_bit(name):
    kept = kept_by(BACKENDS[name], Dropout(jax.random.key(5), RATE), causal=True)
    np.testing.assert_array_equal(kept, WHOLE & np.tri(T, S, dtype=bool))


@pytest.mark.parametrize("name", ["reference", "tiles_3_5"])
def test_a_shard_of_batch_and_heads_has_the_bits_of_the_whole(name):
    dropout = Dropout(jax.random.key(5), RATE, batch_start=1, head_start=2)
    kept = kept_by(BACKENDS[name], dropout, batch=2, heads=2, kv_heads=1)
    np.testing.assert_array_equal(kept, WHOLE[1:, 2:])


@pytest.mark.parametrize("name", ["reference", "tiles_3_5"])
def test_a_shard_of_the_rows_has_the_bits_of_the_whole(name):
    dropout = Dropout(jax.random.key(5), RATE)
    kept = kept_by(BACKENDS[name], dropout, rows=4, tokens=Tokens(4, start=7))
    np.testing.assert_array_equal(kept, WHOLE[:, :, 7:])
    index = np.array([[9, 2, 3]], np.int32)
    kept = kept_by(BACKENDS[name], dropout, rows=3, tokens=Tokens(3, index=index))
    np.testing.assert_array_equal(kept, WHOLE[:, :, [9, 2, 3]])


@pytest.mark.parametrize("name", ["reference", "tiles_3_5"])
def test_under_vmap_over_keys_and_starts(name):
    keys = jax.random.split(jax.random.key(1), 3)

    def kept(key, start):
        return kept_by(BACKENDS[name], Dropout(key, RATE, batch_start=start), batch=1)

    mapped = jax.jit(jax.vmap(kept))(keys, jnp.arange(3))
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(mapped[i], bits(key, RATE, 1, N, T, S, batch_start=i))


@pytest.mark.parametrize("name", ["reference", "tiles_3_5"])
def test_a_vmap_over_examples_with_their_places_has_the_bits_of_the_batch(name):
    def kept(start):
        dropout = Dropout(jax.random.key(5), RATE, batch_start=start)
        return kept_by(BACKENDS[name], dropout, batch=1)[0]

    np.testing.assert_array_equal(jax.jit(jax.vmap(kept))(jnp.arange(B)), WHOLE)


def test_kept_weights_are_scaled_and_the_denominator_is_not_dropped():
    v = jnp.ones((1, S, 1, 1))
    zeros = jnp.zeros((1, S, 1, 3))
    dropout = Dropout(jax.random.key(5), RATE)
    out = attend(Call(zeros, zeros, v, dropout=dropout), Reference()).out[0, :, 0, 0]
    kept = bits(5, RATE, 1, 1, S, S)[0, 0].sum(-1)
    np.testing.assert_allclose(out, kept / S / (1 - RATE), rtol=1e-6)


def test_lse_knows_nothing_of_dropout():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, S, 1, 3)), jnp.float32)
    for backend in (Reference(), Blockwise(block_q=4, block_k=4)):
        with_, without = (
            attend(Call(x, x, x, dropout=d), backend).lse
            for d in (Dropout(jax.random.key(5), RATE), None)
        )
        np.testing.assert_array_equal(with_, without)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), "0.1", None])
def test_rates_outside_are_refused(rate):
    with pytest.raises(ShapeError, match=r"rate must be a number in \[0, 1\)"):
        Dropout(jax.random.key(0), rate)


# ---- statistics -------------------------------------------------------------------------------


def assert_normal(z, what):
    """Raise unless every |z| is as small as that of so many standard normal numbers should be."""
    z = np.abs(np.atleast_1d(z))
    bound = NormalDist().inv_cdf(1 - CHANCE / (2 * z.size))
    assert z.max() <= bound, f"{what}: |z| = {z.max():.2f} > {bound:.2f} at {z.argmax()}"


def chi_square_z(statistic, freedom):
    """Turn chi-square statistics into standard normal numbers (Wilson and Hilferty)."""
    ratio = np.cbrt(np.asarray(statistic) / freedom)
    return (ratio - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def centred(drawn, rate):
    """Return bits of mean 0 and variance 1."""
    return (drawn - (1 - rate)) / math.sqrt(rate * (1 - rate))


def correlation(a, b):
    """Return the z-score of the correlation of two arrays of mean 0 and variance 1."""
    return float(np.sum(a * b) / math.sqrt(a.size))


BIG = {"batch": 4, "heads": 8, "rows": 128, "columns": 256}
RATES = [0.5, 0.1, 0.01, 0.9]
_drawn = {}


def big(rate, key=0):
    if (rate, key) not in _drawn:
        _drawn[rate, key] = centred(bits(key, rate, **BIG), rate)
    return _drawn[rate, key]


@pytest.mark.parametrize("rate", RATES)
def test_the_rate(rate):
    x = big(rate)
    assert_normal(x.sum() / math.sqrt(x.size), "rate")


@pytest.mark.parametrize("axis, name", list(enumerate("bnts")))
def test_every_slice_has_the_rate(axis, name):
    for rate in RATES:
        x = big(rate)
        others = tuple(i for i in range(4) if i != axis)
        count = x.size // x.shape[axis]
        assert_normal(x.sum(others) / math.sqrt(count), f"rate {rate} along {name}")


@pytest.mark.parametrize("rate", RATES)
def test_sums_of_rows_and_columns_spread_as_they_should(rate):
    x = big(rate)
    rows = x.sum(-1) ** 2 / x.shape[-1]
    columns = x.sum(-2) ** 2 / x.shape[-2]
    excess = 1 / (rate * (1 - rate)) - 6  # of a bit's kurtosis over the normal one
    for sums, length in ((rows, x.shape[-1]), (columns, x.shape[-2])):
        spread = math.sqrt((2 + excess / length) * sums.size)
        assert_normal((sums.sum() - sums.size) / spread, "chi-square of sums")


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_no_correlation_at_any_lag_along_any_axis(rate):
    x = big(rate)
    z = []
    for axis, lags in enumerate((3, 7, 100, 200)):
        for lag in range(1, lags + 1):
            a = np.take(x, range(lag, x.shape[axis]), axis)
            b = np.take(x, range(x.shape[axis] - lag), axis)
            z.append(correlation(a, b))
    assert_normal(z, "autocorrelation")


def test_no_correlation_at_two_dimensional_lags():
    x = big(0.5)
    z = []
    for down in (*range(1, 17), 32, 64):
        for right in (*range(-16, 17), -64, 64, 128, -128):
            a, b = x[:, :, down:], x[:, :, :-down]
            if right > 0:
                a, b = a[..., right:], b[..., :-right]
            elif right < 0:
                a, b = a[..., :right], b[..., -right:]
            z.append(correlation(a, b))
    assert_normal(z, "shifted rows")


def test_no_correlation_between_examples_heads_and_keys():
    streams = [big(0.5, key).reshape(-1, 128 * 256) for key in (0, 1, 2)]
    streams = np.concatenate(streams)
    z = streams @ streams.T / math.sqrt(streams.shape[1])
    assert_normal(z[np.triu_indices(len(z), 1)], "pairs of examples, heads and keys")


def test_keys_one_bit_apart_share_nothing():
    flips = [(1 << i, 0) for i in range(32)] + [(0, 1 << i) for i in range(32)]
    base = np.array([0x12345678, 0x9ABCDEF0], np.uint32)
    draw = jax.jit(lambda key: Dropout(key, 0.5).keep(1, 1, ROWS, ROWS))
    want = centred(np.asarray(draw(base)), 0.5)
    others = [centred(np.asarray(draw(base ^ np.array(flip, np.uint32))), 0.5) for flip in flips]
    assert_normal([correlation(want, x) for x in others], "neighbouring keys")
    shifted = [correlation(want[..., 1:], x[..., :-1]) for x in others]
    assert_normal(shifted, "neighbouring keys, a column apart")


ROWS = np.arange(128, dtype=np.int32)[None]


def test_no_wave_in_any_direction():
    x = big(0.5)
    power = np.abs(np.fft.fft2(x)) ** 2 / (x.shape[-1] * x.shape[-2])
    # Powers are exponential of mean 1; at the four real frequencies they are squares of normals.
    power = power[..., 1 : x.shape[-1] // 2]
    bound = math.log(power.size / CHANCE)
    assert power.max() <= bound, f"power {power.max():.1f} > {bound:.1f}"


def test_no_wave_through_the_mean_picture():
    x = big(0.5).reshape(-1, 128, 256)
    mean = x.sum(0) / math.sqrt(len(x))
    power = np.abs(np.fft.fft2(mean)) ** 2 / mean.size
    power = power[:, 1:128]
    assert power.max() <= math.log(power.size / CHANCE)


@pytest.mark.parametrize(
    "down, right", [(1, 1), (1, 2), (2, 1), (8, 8), (1, 64), (64, 1), (16, 128)]
)
def test_two_by_two_patterns(down, right):
    drawn = bits(11, 0.5, 2, 4, 128, 256).reshape(8, 128, 256)
    blocks = drawn.reshape(8, 128 // (2 * down), 2, down, 256 // (2 * right), 2, right)
    blocks = blocks.transpose(0, 1, 3, 4, 6, 2, 5).reshape(-1, 4)
    counts = np.bincount(blocks @ np.array([8, 4, 2, 1]), minlength=16)
    expected = len(blocks) / 16
    assert_normal(chi_square_z(((counts - expected) ** 2).sum() / expected, 15), "2 x 2 patterns")


@pytest.mark.parametrize("axis", [2, 3], ids=["down", "right"])
@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_run_lengths(axis, rate):
    drawn = np.moveaxis(bits(12, rate, 2, 4, 256, 256), axis, -1).reshape(-1, 256)
    changes = (drawn[:, 1:] != drawn[:, :-1]).sum()
    # Two neighbouring changes share a bit: the variance has a covariance term when rate != 1/2.
    p, q = 1 - rate, rate
    one, n = 2 * p * q, 255
    shared = p * q * (p + q) - one**2
    variance = len(drawn) * (n * one * (1 - one) + 2 * (n - 1) * shared)
    assert_normal((changes - len(drawn) * n * one) / math.sqrt(variance), "number of runs")
    flat = np.flatnonzero(drawn.reshape(-1))
    gaps = np.minimum(np.diff(flat), 12)
    counts = np.bincount(gaps, minlength=13)[1:]
    shares = np.array([p * q**i for i in range(11)] + [q**11]) * len(gaps)
    use = shares >= 5
    counts, shares = (np.append(x[use], x[~use].sum()) for x in (counts, shares))
    counts, shares = counts[shares > 0], shares[shares > 0]
    assert_normal(chi_square_z(((counts - shares) ** 2 / shares).sum(), len(shares) - 1), "gaps")


def rank(matrix):
    """Return the rank over two elements of a square matrix of bits."""
    rows = [int("".join("1" if x else "0" for x in row), 2) for row in matrix]
    found = 0
    while rows:
        pivot = rows.pop()
        if pivot:
            found += 1
            low = pivot & -pivot
            rows = [row ^ pivot if row & low else row for row in rows]
    return found


def test_ranks_of_bit_matrices():
    tiles = bits(13, 0.5, 2, 4, 256, 256).reshape(8, 8, 32, 8, 32).swapaxes(2, 3)
    ranks = np.array([rank(tile) for tile in tiles.reshape(-1, 32, 32)])
    shares = np.array([0.2887880951, 0.5775761902, 0.1336357147]) * len(ranks)
    counts = np.array([(ranks == 32).sum(), (ranks == 31).sum(), (ranks < 31).sum()])
    assert_normal(chi_square_z(((counts - shares) ** 2 / shares).sum(), 2), "ranks")


def test_rows_far_apart_and_long_rows():
    rows = np.array([[0, 1, 2, 2**16, 2**16 + 1, 2**20, 2**31 - 1]], np.int32)
    x = centred(bits(14, 0.5, rows=rows, columns=2**16), 0.5)[0, 0]
    z = x @ x.T / math.sqrt(x.shape[1])
    assert_normal(z[np.triu_indices(len(z), 1)], "rows far apart")
    long = x.reshape(-1)
    power = np.abs(np.fft.rfft(x, axis=-1)[:, 1:-1]) ** 2 / x.shape[1]
    assert power.max() <= math.log(power.size / CHANCE), "a wave along a long row"
    assert_normal([correlation(long[lag:], long[:-lag]) for lag in range(1, 65)], "long rows")
