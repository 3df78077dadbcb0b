"""Rotary positions against complex numbers in float64, and their scalings against the published formulas."""

import dataclasses
import inspect
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Causal, Rotary, SameSegment, ShapeError, Tokens
from mha_jax.attention.rotary import NTK, Linear, Llama3, Scaling, YaRN
from tests import oracles
from tests.drawn import double_precision

B, L, N, H = 2, 11, 3, 24


def draw(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def turned(x, coordinates, frequencies, interleaved=False, magnitude=1.0):
    """Turn pairs as complex numbers; coordinates [B, L, A], frequencies of every axis's pairs [P]."""
    x = np.asarray(x, np.float64)
    angles = np.concatenate(
        [c[..., None] * frequencies for c in np.moveaxis(coordinates, -1, 0)], -1
    )
    size = 2 * angles.shape[-1]
    front = x[..., :size]
    z = front[..., 0::2] + 1j * front[..., 1::2]
    if not interleaved:
        z = front[..., : size // 2] + 1j * front[..., size // 2 :]
    z = z * magnitude * np.exp(1j * angles)[:, :, None]
    out = x.copy()
    if interleaved:
        out[..., 0:size:2], out[..., 1:size:2] = z.real, z.imag
    else:
        out[..., : size // 2], out[..., size // 2 : size] = z.real, z.imag
    return out


def plain(size, base=10000.0):
    return np.array([base ** (-2 * i / size) for i in range(size // 2)])


POSITIONS = np.random.default_rng(1).integers(0, 500, (B, L)).astype(np.int32)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction, size", [(1.0, 24), (0.5, 12), (0.25, 6)])
def test_pairs_turn_by_their_positions(interleaved, fraction, size):
    x = draw(B, L, N, H)
    rotary = Rotary(base=500.0, fraction=fraction, interleaved=interleaved)
    want = turned(x, POSITIONS[..., None], plain(size, 500.0), interleaved)
    got = jax.jit(rotary.__call__)(x, POSITIONS)
    oracles.assert_close(got, want, 500 * 2e-7)  # an angle's rounding grows with it
    with double_precision():
        oracles.assert_close(rotary(np.asarray(x, np.float64), POSITIONS), want, 1e-12)


def test_each_axis_turns_its_share():
    x, axes = draw(B, 15, N, H), (3, 5)
    rotary = Rotary(axes=axes)
    places = np.broadcast_to(np.arange(15), (B, 15))
    coordinates = np.stack(np.unravel_index(places, axes), -1).astype(np.int32)
    want = turned(x, coordinates, plain(12))
    oracles.assert_close(rotary(x, np.arange(15)), want, 1e-5)
    oracles.assert_close(rotary(x, coordinates), want, 1e-5)
    oracles.assert_close(jax.jit(rotary.__call__)(x, places), want, 1e-5)


def llama3(inverse, factor, low, high, old):
    """Llama 3.1's `apply_scaling`, pair by pair."""
    out = []
    for freq in inverse:
        wavelength = 2 * math.pi / freq
        if wavelength < old / high:
            out.append(freq)
        elif wavelength > old / low:
            out.append(freq / factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            out.append((1 - smooth) * freq / factor + smooth * freq)
    return np.array(out)


def yarn(base, size, factor, old, fast, slow, truncate):
    """The paper's equations 17 to 19 and 23."""
    low, high = (
        size * math.log(old / (b * 2 * math.pi)) / (2 * math.log(base)) for b in (fast, slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    out = []
    for i in range(size // 2):
        freq = base ** (-2 * i / size)
        ramp = min(max((i - low) / (high - low), 0), 1)
        out.append(freq / factor * ramp + freq * (1 - ramp))
    return np.array(out)


BASE, SIZE = 10000.0, 128
FORMULAS = [
    (Linear(4.0), plain(SIZE) / 4, 1.0),
    (NTK(4.0), plain(SIZE, BASE * 4 ** (128 / 126)), 1.0),
    (Llama3(8.0), llama3(plain(SIZE), 8.0, 1.0, 4.0, 8192), 1.0),
    (Llama3(32.0, 2.0, 3.0, 1000), llama3(plain(SIZE), 32.0, 2.0, 3.0, 1000), 1.0),
    (YaRN(4.0, 4096), yarn(BASE, SIZE, 4.0, 4096, 32, 1, True), 0.1 * math.log(4) + 1),
    (
        YaRN(32.0, 4096, truncate=False, attention=1.3),
        yarn(BASE, SIZE, 32.0, 4096, 32, 1, False),
        1.3,
    ),
]


@pytest.mark.parametrize("scaling, frequencies, magnitude", FORMULAS, ids=lambda x: str(x)[:20])
def test_scalings_are_those_of_their_papers(scaling, frequencies, magnitude):
    rotary = Rotary(scaling=scaling)
    np.testing.assert_allclose(rotary.frequencies(SIZE), frequencies, rtol=1e-12)
    x = draw(1, 5, 1, SIZE)
    want = turned(x, np.arange(5)[None, :, None], frequencies, magnitude=magnitude)
    oracles.assert_close(rotary(x, np.arange(5)), want, 2e-6)


CONFIGS = [
    ({"rope_theta": 1e6}, Rotary(base=1e6)),
    ({"rotary_pct": 0.25, "rotary_emb_base": 10000}, Rotary(fraction=0.25)),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rotary(scaling=Linear(2.0))),
    (
        {
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        Rotary(base=500000.0, scaling=Llama3(8.0)),
    ),
    (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            }
        },
        Rotary(base=150000.0, scaling=YaRN(32.0, 4096, truncate=False)),
    ),
    (
        {"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        Rotary(scaling=YaRN(2.0, 8192)),
    ),
    # Of 16 features 4.8, and of 24 7.2: whole ones turn.
    ({"rotary_pct": 0.3, "hidden_size": 48, "num_attention_heads": 3}, Rotary(fraction=4 / 16)),
    ({"partial_rotary_factor": 0.35, "head_dim": 24, "hidden_size": 8}, Rotary(fraction=8 / 24)),
    ({"partial_rotary_factor": 1, "head_dim": 24}, Rotary()),
]


@pytest.mark.parametrize("config, rotary", CONFIGS)
def test_configs_of_hugging_face(config, rotary):
    assert Rotary.from_config(config) == rotary
    assert Rotary.from_config(rotary.to_config()) == rotary


_YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16}
WRONG_CONFIGS = [
    {"rope_scaling": _YARN},
    {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    {"rope_scaling": _YARN, "max_position_embeddings": None},
    {"rope_scaling": _YARN | {"original_max_position_embeddings": "a", "factor": 2.0}},
    *[
        {"rope_scaling": _YARN | {"factor": 2.0, "mscale": x, "mscale_all_dim": 1}}
        for x in ("a", -1)
    ],
    {"rope_scaling": {"rope_type": ["yarn"]}},
    *[{"partial_rotary_factor": x, "head_dim": 16} for x in (0.01, 1.01, -1, "a", [1])],
]


@pytest.mark.parametrize("config", WRONG_CONFIGS, ids=str)
def test_configs_of_rotary_positions_that_cannot_be_meant(config):
    with pytest.raises(ShapeError):
        Rotary.from_config(config)


SAID_OTHERWISE = [
    (lambda: mj.Rotary(head_dim=64), "got head_dim=64. Here the head size is not said"),
    (lambda: mj.Rotary(dim=64, base=2.0), "got dim=64. Here the head size is not said"),
    (lambda: mj.Rotary(theta=1e6), "got theta=1000000.0. Here pass base=."),
    (lambda: mj.Rotary(max_wavelength=1e4), "got max_wavelength=10000.0. Here pass base=."),
    (lambda: mj.Rotary(rotary_pct=0.5), "got rotary_pct=0.5. Here pass fraction=."),
    (lambda: mj.Rotary(max_seq_len=9), "got max_seq_len=9. Here positions have no largest one."),
    (lambda: mj.Rotary(scaling_factor=2.0), r"Here pass scaling=mj.rotary.Linear\(factor\)\."),
    (lambda: mj.Rotary(bass=2.0), r"got bass=2.0\. Rotary\(base=10000.0\) is the usual one\."),
]


@pytest.mark.parametrize("wrong, message", SAID_OTHERWISE)
def test_what_others_call_otherwise_is_told(wrong, message):
    start = "Rotary takes base, fraction, interleaved, scaling, axes: "
    with pytest.raises(mj.ArgumentError, match=message) as caught:
        wrong()
    assert str(caught.value).startswith(start)


def test_a_head_size_is_no_base():
    for size in (64, np.int32(128)):
        with pytest.raises(
            mj.ShapeError, match=r"looks like a head size; .*pass base=(64|128)\.0\."
        ):
            mj.Rotary(size)
    assert mj.Rotary(64.0).base == 64.0 and mj.Rotary(10000) == mj.Rotary()


def test_the_signature_shows_the_arguments():
    names = ["base", "fraction", "interleaved", "scaling", "axes"]
    assert list(inspect.signature(mj.Rotary).parameters) == names
    assert mj.Rotary(2.0) == dataclasses.replace(mj.Rotary(), base=2.0)
    assert pickle.loads(pickle.dumps(mj.Rotary(2.0))) == mj.Rotary(2.0)


def test_deepseeks_magnitude_is_that_of_both_its_weights():
    rope = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5}
    config = {"max_position_embeddings": 4096, "rope_scaling": rope}
    want = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert math.isclose(Rotary.from_config(config).scaling.magnitude, want)


def test_ntk_is_a_larger_base_in_a_config():
    again = Rotary.from_config(Rotary(scaling=NTK(4.0)).to_config(head_size=H))
    np.testing.assert_allclose(again.frequencies(H), Rotary(scaling=NTK(4.0)).frequencies(H))


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_kept_as_plain_ones(number):
    scalings = [Linear(number(4)), Llama3(number(8)), YaRN(number(4), np.int32(64)), NTK(number(4))]
    for scaling in scalings:
        rotary = Rotary(number(10_000), np.float32(0.5), np.bool_(True), scaling, [np.int64(2), 3])
        layer = mj.MultiHeadAttention(2, 24, rotary=rotary)
        again = mj.MultiHeadAttention.from_config(json.loads(json.dumps(layer.get_config())))
        assert again == layer and hash(again) == hash(layer)
    assert json.dumps(Rotary(number(10_000), scaling=scalings[2]).to_config())


def test_logits_know_distances_alone():
    q, k = draw(1, L, N, H), draw(1, L, N, H)[:, ::-1].copy()
    rotary = Rotary(scaling=YaRN(4.0, 64))

    @jax.jit
    def out(shift):
        at = jnp.arange(L, dtype=jnp.int32)[None] + shift
        return mj.dot_product_attention(rotary(q, at), rotary(k, at), q)

    np.testing.assert_allclose(out(0), out(97), atol=2e-5)


def test_packed_sequences_are_turned_as_if_alone():
    x, rotary = draw(1, L, N, H), Rotary()
    tokens = Tokens.packed(np.array([[3] * 7 + [5] * 4]))
    turned = rotary(x, tokens.positions)
    both = mj.dot_product_attention(
        *(turned, turned, x),
        mask=SameSegment() & Causal(),
        query_tokens=tokens,
        key_tokens=tokens,
    )
    alone = rotary(x[:, 7:], np.arange(4))
    want = mj.dot_product_attention(alone, alone, x[:, 7:], mask=Causal())
    np.testing.assert_allclose(both[:, 7:], want, atol=1e-6)


def test_gradients_are_turned_back():
    x, d = draw(1, L, N, H), draw(1, L, N, H)[..., ::-1].copy()
    _, vjp = jax.vjp(lambda x: Rotary(fraction=0.5)(x, POSITIONS[:1]), x)
    want = turned(d, -POSITIONS[:1, :, None], plain(12))
    oracles.assert_close(vjp(d)[0], want, 1e-4)


def test_a_scaling_of_ones_own_is_one_class():
    @dataclasses.dataclass(frozen=True)
    class Still(Scaling):
        def frequencies(self, base, size):
            return np.zeros(size // 2)

    x = draw(1, 3, 1, 4)
    np.testing.assert_array_equal(Rotary(scaling=Still())(x, np.arange(3)), x)
    with pytest.raises(ShapeError, match="no name for Still"):
        Rotary(scaling=Still()).to_config()


def test_the_dtype_is_kept_and_angles_are_not_rounded_to_it():
    x = jnp.asarray(draw(1, 3, 1, H), jnp.bfloat16)
    got = Rotary()(x, np.array([1000, 1001, 1002]))
    assert got.dtype == jnp.bfloat16
    want = turned(x, np.array([1000, 1001, 1002])[None, :, None], plain(H))
    assert oracles.relative_error(got, want) < 2**-8


X = np.ones((B, L, N, H), np.float32)
WRONG = [
    (lambda: Rotary()(X[..., :5], np.arange(L)), r"head size 5.*multiple of 2; change key_dim"),
    (lambda: Rotary(axes=(2, 2))(X[..., :6], np.arange(L)), r"axes=\(2, 2\).*multiple of 4"),
    (lambda: Rotary(fraction=0.01)(X, np.arange(L)), r"fraction=0.01 is 0"),
    (lambda: Rotary()(X, np.arange(L + 1)), r"\(2, 11\).*got int\d+\[12\]"),
    (lambda: Rotary()(X, np.ones(L)), r"must be integers.*got float64\[11\]"),
    (lambda: Rotary()(X, np.ones((B, L, 2), int)), r"got int\d+\[2, 11, 2\]"),
    (lambda: Rotary(base=0.5), r"base of Rotary.*got 0\.5"),
    (lambda: Rotary(base="1e4"), r"base of Rotary.*got '1e4'"),
    (lambda: Rotary(fraction=1.5), r"fraction of Rotary.*got 1\.5.*rotary=None"),
    (lambda: Rotary(scaling={"factor": 2}), r"scaling of Rotary.*from_config"),
    (lambda: Rotary(axes=7), r"axes of Rotary.*got 7.*\(14, 14\)"),
    (lambda: Linear(0.0), r"factor of Linear must be a positive number: got 0\.0"),
    (lambda: YaRN(4.0, 9, fast=-1), r"fast of YaRN must be a positive number: got -1"),
    (lambda: Llama3(8.0, low=4.0, high=1.0), r"low of Llama3 must be below high: got low=4\.0"),
    (lambda: Rotary(interleaved=True).to_config(), r"nothing of interleaved=True and axes=None"),
    (lambda: Rotary(scaling=NTK(2.0)).to_config(), r"got head_size=None"),
    (lambda: Rotary().to_config(head_size="8"), r"head_size must be an integer.*got '8'"),
    (
        lambda: Rotary.from_config({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        r"type 'dynamic' are none of \['linear', 'llama3', 'yarn'\].*cache",
    ),
    (
        lambda: Rotary.from_config({"rope_parameters": {"full_attention": {}}}),
        r"each type of layer: got \['full_attention'\]",
    ),
    (
        lambda: Rotary.from_config({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        r"original_length of YaRN must be a positive number: got None",
    ),
]


@pytest.mark.parametrize("make, sentence", WRONG)
def test_wrong_rotary_positions_are_explained(make, sentence):
    with pytest.raises(ShapeError, match=sentence):
        make()
