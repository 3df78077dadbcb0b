"""Biases by rule against the oracle with their matrices written out in plain NumPy, on every tiled path."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Call, Causal, SameSegment, ShapeError, Tokens, UnsupportedError, biases
from mha_jax.attention.check import check
from mha_jax.attention.tokens import distance
from mha_jax.backends.blockwise import Blockwise, diagonals, few_rows
from mha_jax.backends.reference import Reference
from tests import oracles
from tests.backends import backends, tiles

B, T, S, N, K, H, V = 2, 23, 29, 6, 3, 7, 5
BACKENDS = backends(small_tiles=tiles(16, 8), apart=Blockwise(block_q=7, block_k=5, apart=True))


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


Q, KEYS, VALUES = draw(1, B, T, N, H), draw(2, B, S, K, H), draw(3, B, S, K, V)
D_OUT, D_LSE = draw(4, B, T, N, V), draw(5, B, N, T)
ROWS, COLUMNS = np.arange(T)[None, :, None], np.arange(S)[None, None]
SEGMENTS = {
    n: np.sort(np.random.default_rng(n).integers(0, 3, (B, n)), -1).astype(np.int32) for n in (T, S)
}


def restarted(ids):
    first = np.array([[np.flatnonzero(row == x)[0] for x in row] for row in ids])
    return np.arange(ids.shape[1]) - first


PACKED = restarted(SEGMENTS[T])[:, :, None], restarted(SEGMENTS[S])[:, None, :]


def t5_bucket(ahead, bidirectional, count, far):
    """T5's bucket of one distance, key minus query, with exact logarithms."""
    first, back = 0, max(-ahead, 0)
    if bidirectional:
        count //= 2
        first, back = (count if ahead > 0 else 0), abs(ahead)
    exact = count // 2
    if back < exact:
        return first + back
    share = math.log(back / exact) / math.log(far / exact) * (count - exact)
    return first + min(exact + math.floor(share + 1e-9), count - 1)


@dataclasses.dataclass(frozen=True)
class Ruled:
    """A bias, and which of its numbers a pair of tokens has: rows [#B, T, S] of a table, and factors."""

    name: str
    bias: object
    rows: np.ndarray
    factor: np.ndarray = dataclasses.field(default_factory=lambda: np.ones((1, 1, 1)))
    tokens: tuple | None = None

    @property
    def table(self):
        return np.atleast_2d(jax.tree.leaves(self.bias)[0])

    def dense(self):
        return (self.table[self.rows] * self.factor[..., None]).transpose(0, 3, 1, 2)

    def gradient(self, dx):
        """Sum the gradients [B, N, T, S] of what every number was added to."""
        dx = dx * self.factor[:, None]
        rows = np.broadcast_to(self.rows, (B, T, S))
        table = np.zeros(self.table.shape)
        for n in range(N):
            np.add.at(table[:, n], rows, dx[:, n])
        return table


def of_buckets(name, bidirectional, count, far, distances, tokens=None):
    rows = np.vectorize(t5_bucket)(distances, bidirectional, count, far)
    bias = biases.Buckets(draw(6, count, N), bidirectional, far)
    return Ruled(name, bias, rows, tokens=tokens)


def of_grid(axes):
    """Return rows of Swin's table, from its published index: differences moved and folded."""
    size = math.prod(axes)
    places = np.stack(np.unravel_index(np.arange(max(T, S)) % size, axes), -1)
    apart = places[:T, None] - places[None, :S] + np.array(axes) - 1
    return np.ravel_multi_index(tuple(np.moveaxis(apart, -1, 0)), [2 * n - 1 for n in axes])[None]


def packed_tokens():
    return Tokens.packed(SEGMENTS[T]), Tokens.packed(SEGMENTS[S])


def shifted_tokens():
    return Tokens(T, start=S - T), Tokens(S)


AHEAD = COLUMNS - ROWS
RULES = [
    Ruled("alibi", biases.Alibi(np.abs(draw(7, N))), np.zeros_like(AHEAD), -np.abs(AHEAD)),
    Ruled(
        *("alibi_packed", biases.Alibi(draw(7, N)), np.zeros((1, 1, 1), int)),
        -np.abs(PACKED[1] - PACKED[0]),
        packed_tokens,
    ),
    of_buckets("buckets", True, 12, 21, AHEAD),
    of_buckets("buckets_backward", False, 11, 19, AHEAD),
    of_buckets("buckets_shifted", True, 12, 21, AHEAD - (S - T), shifted_tokens),
    of_buckets("buckets_packed", False, 8, 9, PACKED[1] - PACKED[0], packed_tokens),
    Ruled("relative", biases.Relative(draw(8, 15, N)), 7 - np.clip(AHEAD, -7, 7)),
    Ruled("relative_grid", biases.Relative(draw(9, 9 * 13, N), (5, 7)), of_grid((5, 7))),
]


def call_of(rule, **options):
    tokens = (None, None) if rule.tokens is None else rule.tokens()
    mask = SameSegment() & Causal() if rule.tokens is packed_tokens else Causal()
    return Call(*map(jnp.asarray, (Q, KEYS, VALUES)), *tokens, mask, rule.bias, **options)


def visible(rule):
    if rule.tokens is packed_tokens:
        same = SEGMENTS[T][:, :, None] == SEGMENTS[S][:, None]
        return (same & (PACKED[0] >= PACKED[1]))[:, None]
    return ((S - T if rule.tokens else 0) >= AHEAD)[:, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_outputs_and_gradients_agree_with_the_oracle(rule, backend):
    call = call_of(rule)

    def forward(arrays):
        return mj.attend(dataclasses.replace(call, **arrays), BACKENDS[backend])

    @jax.jit
    def both(arrays):
        output, vjp = jax.vjp(forward, arrays)
        d_lse = jnp.where(jnp.isinf(output.lse), 0, D_LSE)
        return output, vjp(type(output)(jnp.asarray(D_OUT), d_lse))[0]

    (out, lse), grads = both({name: getattr(call, name) for name in ("q", "k", "v", "bias")})
    options = {"visible": visible(rule), "bias": rule.dense()}
    want, want_lse, _ = oracles.attention(Q, KEYS, VALUES, **options)
    d_lse = np.where(np.isinf(want_lse), 0, D_LSE)
    dq, dk, dv, dx = oracles.gradients(Q, KEYS, VALUES, D_OUT, d_lse, **options)
    epsilon = np.finfo(np.float32).eps
    assert oracles.relative_error(out, want) <= 4 * epsilon
    assert oracles.relative_error(lse, want_lse) <= 4 * epsilon
    for got, wanted in zip((grads["q"], grads["k"], grads["v"]), (dq, dk, dv)):
        assert oracles.relative_error(got, wanted) <= 8 * epsilon
    d_table = np.atleast_2d(jax.tree.leaves(grads["bias"])[0])
    sums = np.abs(dx * rule.factor[:, None]).sum()  # what is summed up is larger than its sum
    oracles.assert_close(d_table, rule.gradient(dx), epsilon * sums)
    assert np.abs(d_table).max() > 0.01


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_pass_for_few_rows_adds_them(rule):
    call = check(call_of(rule))
    want, _, _ = oracles.attention(Q, KEYS, VALUES, visible=visible(rule), bias=rule.dense())
    oracles.assert_close(jax.jit(few_rows.forward)(call).out, want, 1e-5)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_scores_of_some_rows_and_heads(rule):
    options = {"visible": visible(rule), "bias": rule.dense()}
    _, _, want = oracles.attention(Q, KEYS, VALUES, **options)
    some = mj.attention_scores(call_of(rule), rows=slice(3, 9), heads=np.array([4, 1]))
    oracles.assert_close(some, want[:, [4, 1], 3:9], 1e-6)


def test_t5_agrees_with_its_own_code_at_every_distance():
    torch = pytest.importorskip("torch")
    ahead = torch.arange(-300, 301)
    for bidirectional, count, far in ((True, 32, 128), (False, 32, 128), (True, 16, 64)):
        buckets, first, back = count, torch.zeros_like(ahead), torch.clamp(-ahead, min=0)
        if bidirectional:
            buckets //= 2
            first, back = (ahead > 0).long() * buckets, ahead.abs()
        exact = buckets // 2
        logs = torch.log(back.float() / exact) / math.log(far / exact) * (buckets - exact)
        large = torch.clamp(exact + logs.clamp(min=0).long(), max=buckets - 1)
        want = first + torch.where(back < exact, back, large)
        bias = biases.Buckets(np.arange(count, dtype=np.float32)[:, None], bidirectional, far)
        got = bias.at(np.arange(-300, 301), 0)
        np.testing.assert_array_equal(got, want.numpy())


def small(seed=0, length=9):
    x = jnp.asarray(draw(seed, 1, length, 2, 4))
    return x, biases.Buckets(jnp.asarray(draw(seed + 1, 6, 2)), False, 8)


@pytest.mark.parametrize("order", ["hessian", "jvp", "reverse_over_reverse"])
def test_every_order_of_derivative(order):
    x, bias = small()

    def loss(table, x, backend):
        rule = dataclasses.replace(bias, table=table) + biases.Alibi(table[0])
        out = mj.dot_product_attention(x, x, x, bias=rule, mask=Causal(), backend=backend)
        return (out**3).sum()

    def derivative(backend):
        f = lambda table: loss(table, x, backend)  # noqa: E731
        if order == "jvp":
            return jax.jvp(f, (bias.table,), (jnp.cos(bias.table),))[1]
        if order == "hessian":
            return jax.hessian(f)(bias.table)
        return jax.grad(lambda t: (jax.grad(f)(t) ** 2).sum())(bias.table)

    reference, tiled = (
        jax.jit(derivative, static_argnums=0)(b) for b in (Reference(), Blockwise(block_q=4))
    )
    np.testing.assert_allclose(tiled, reference, rtol=2e-4, atol=2e-5)
    assert float(jnp.abs(reference).max()) > 0.01


ALIKE = {
    "buckets": (biases.Buckets(draw(7, 8, 4), max_distance=7), True),
    "relative": (biases.Relative(draw(8, 9, 4)), True),
    "sum": (biases.Relative(draw(8, 9, 4)) + biases.Buckets(draw(7, 8, 4), False, 11), True),
    "alibi": (biases.Alibi.of_heads(4), False),
}


@pytest.mark.parametrize("mask", [mj.Full(), Causal()], ids=str)
@pytest.mark.parametrize("name", ALIKE)
def test_gradients_of_tiles_whose_distances_are_alike_to_the_rule(name, mask):
    rule, asks = ALIKE[name]
    (q, d_out), (k, v) = (
        [jnp.asarray(draw(seed + n, 2, *shape, 8)) for seed in (1, 2)]
        for n, shape in ((0, (37, 4)), (2, (53, 2)))
    )

    def gradients(backend):
        def loss(rule):
            out = mj.dot_product_attention(q, k, v, mask=mask, bias=rule, backend=backend)
            return jnp.vdot(out, d_out)

        lowered = jax.jit(jax.grad(loss)).lower(jax.tree.map(jnp.asarray, rule))
        return lowered.compile()(jax.tree.map(jnp.asarray, rule)), lowered.as_text()

    want, _ = gradients(Reference())
    for backend in (Blockwise(16, 16), Blockwise(8, 16, pairs=1), Blockwise(16, 16, apart=True)):
        got, text = gradients(backend)
        assert ("stablehlo.case" in text) == asks
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


FAR = 2**31 - 1  # the longest distance


@pytest.mark.parametrize("backend", [*BACKENDS])
@pytest.mark.parametrize("given", ["start", "pos", "traced"])
def test_distances_that_leave_32_bits_are_far_and_not_near(given, backend):
    rules = {
        "alibi": biases.Alibi(np.float32([1e-9, 3e-10])),
        "buckets": biases.Buckets(jnp.arange(8.0).reshape(4, 2), False, 8),
        "relative": biases.Relative(jnp.arange(10.0).reshape(5, 2)),
    }
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    lows, highs = np.arange(6) - 2**31, np.arange(6) + 2**31 - 6

    def out(rule, *pos):
        q, k = pos if given == "start" else (Tokens(6, pos=a) for a in pos)
        return mj.attend(Call(x, x, x, q, k, bias=rule), BACKENDS[backend]).out

    function = jax.jit(out) if given == "traced" else out
    for rows, keys in ((lows, highs), (highs, lows)):
        if given == "start":
            pos = [Tokens(6, int(a[0])) for a in (rows, keys)]
        else:  # some near, some far
            rows, keys = (np.concatenate([a[:3], b[3:]]) for a, b in ((rows, keys), (keys, rows)))
            pos = [a.astype(np.int32)[None] for a in (rows, keys)]
        apart = np.clip(keys[None] - rows[:, None], -FAR, FAR).astype(np.int32)
        for name, rule in rules.items():
            want = rule.at(apart[None], np.arange(2)[:, None, None])[None]
            want = mj.dot_product_attention(x, x, x, bias=want, backend="reference")
            np.testing.assert_allclose(function(rule, *pos), want, atol=1e-5, err_msg=name)


def test_distances_of_32_bits_are_what_64_bits_say():
    edges = [-(2**31), -(2**31) + 1, -(2**30), -1, 0, 1, 2**30, 2**31 - 2, 2**31 - 1]
    q, k = np.meshgrid(edges, edges)
    want = np.clip(k - q, -FAR, FAR)
    for made in (np.asarray, jnp.asarray):
        got = distance(made(q.astype(np.int32)), made(k.astype(np.int32)))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("strips", [True, False])
@pytest.mark.parametrize("rows, columns", [(1, 5), (8, 8), (9, 4), (40, 23), (13, 1)])
def test_diagonals_of_tiles_are_summed(rows, columns, strips):
    x = draw(1, 2, 3, rows, columns)
    got = diagonals.summed(jnp.asarray(x), strips)
    offsets = range(1 - rows, columns)
    want = np.stack([x.trace(n, axis1=-2, axis2=-1) for n in offsets], -1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_long_tables_are_summed_by_strips():
    """The tile is read once, and nothing of its size is made of it."""
    x = jax.ShapeDtypeStruct((2, 512, 512), np.float32)
    memory = jax.jit(diagonals.summed).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * x.size / 8


def test_a_bias_is_mapped_and_passed_through_jit():
    x, bias = small()
    tables = jnp.stack([bias.table, bias.table + 1, bias.table * 2])
    other = jnp.stack([bias.table[0], bias.table[1], bias.table[2]])

    @jax.jit
    def out(rule):
        return mj.dot_product_attention(x, x, x, bias=rule)

    rules = biases.Buckets(tables, False, 8) + biases.Alibi(other)
    mapped = jax.vmap(out)(rules)
    for i in range(3):
        one = biases.Buckets(tables[i], False, 8) + biases.Alibi(other[i])
        np.testing.assert_allclose(mapped[i], out(one), atol=1e-6)
    gradients = jax.vmap(jax.grad(lambda r: out(r).sum()))(rules)
    assert gradients.a.table.shape == tables.shape


def test_a_bias_of_ones_own_may_read_any_fact():
    @biases.pytree
    class OwnSegment(biases.Bias):
        weight: jax.Array

        def logits(self, q, k):
            same = (q.segment == k.segment).astype(self.weight.dtype)
            return same * self.weight * (q.head + 1).astype(self.weight.dtype)

    ids = {n: SEGMENTS[n] for n in (T, S)}
    tokens = [Tokens(n, segment=ids[n]) for n in (T, S)]

    def out(weight, backend):
        call = Call(Q, KEYS, VALUES, *tokens, bias=OwnSegment(weight))
        return mj.attend(call, BACKENDS[backend]).out

    same = (ids[T][:, None, :, None] == ids[S][:, None, None]) * np.arange(1, N + 1)[:, None, None]
    want, _, _ = oracles.attention(Q, KEYS, VALUES, bias=0.3 * same)
    *_, dx = oracles.gradients(Q, KEYS, VALUES, D_OUT, bias=0.3 * same)
    for backend in BACKENDS:
        got, vjp = jax.vjp(lambda w, b=backend: out(w, b), jnp.float32(0.3))
        oracles.assert_close(got, want, 1e-5)
        oracles.assert_close(vjp(jnp.asarray(D_OUT))[0], (dx * same).sum(), 1e-3)


def test_arrays_in_a_sum_are_added():
    array, rule = draw(11, 1, N, T, S), RULES[2]
    bias = rule.bias + biases.Array(array) + biases.Array(array[:, :1])
    want, _, _ = oracles.attention(Q, KEYS, VALUES, bias=rule.dense() + array + array[:, :1])
    for backend in BACKENDS.values():
        got = mj.dot_product_attention(Q, KEYS, VALUES, bias=bias, backend=backend)
        oracles.assert_close(got, want, 1e-5)


def test_steps_from_a_cache_are_those_of_the_whole():
    x, bias = small(length=7)
    whole = mj.dot_product_attention(x, x, x, bias=bias, mask=Causal())
    cache, steps = mj.Cache.empty(1, 11, num_kv_heads=2, key_dim=4), []
    for i in range(7):
        token = x[:, i : i + 1]
        call, cache = cache.extend(check_free(token, bias))
        steps.append(mj.attend(call).out)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=1e-6)


def check_free(token, bias):
    tokens = Tokens(1)
    return Call(token, token, token, tokens, tokens, mask=Causal(), bias=bias)


def test_memory_is_that_of_the_tokens():
    length = 4096
    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    table = jax.ShapeDtypeStruct((32, 2), jnp.float32)

    def loss(x, table):
        return mj.dot_product_attention(x, x, x, bias=biases.Buckets(table)).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, table).compile()
    assert program.memory_analysis().temp_size_in_bytes < length * length


def test_heads_cut_over_devices():
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "heads"))
    x, bias = jnp.asarray(draw(1, 2, 9, 2, 4)), small()[1]

    def loss(x, bias):
        return (mj.dot_product_attention(x, x, x, bias=bias) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, grads = step(jax.device_put(x, spec), bias)
    want, wanted = step(x, bias)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, wanted)


def test_matrices_and_slopes():
    np.testing.assert_array_equal(RULES[2].bias.matrix(Tokens(T), Tokens(S), N), RULES[2].dense())
    eight = [2.0**-n for n in range(1, 9)]
    np.testing.assert_allclose(biases.Alibi.of_heads(8).slopes, eight)
    # Of twelve heads the first eight are those of eight, four more lie between.
    more = [2.0 ** (-n / 2) for n in (1, 3, 5, 7)]
    np.testing.assert_allclose(biases.Alibi.of_heads(12).slopes, [*eight, *more])


X = np.ones((1, 5, 6, 4), np.float32)


@biases.pytree
class Silent(biases.Bias):
    pass


def attended(bias, **options):
    return mj.dot_product_attention(X, X, X, bias=bias, **options)


WRONG = [
    (
        ShapeError,
        lambda: attended(biases.Buckets(np.ones((8, 4), np.float32))),
        r"table of Buckets.*\[R, N\] with N = 6: got \(8, 4\)",
    ),
    (
        ShapeError,
        lambda: attended(biases.Relative(np.ones((7, 6))) + biases.Alibi(np.ones(3))),
        r"slopes of Alibi must be one for every query head, \[N\] = \[6\]: got \(3,\)",
    ),
    (
        ShapeError,
        lambda: attended(biases.Buckets(np.ones((32, 6)), max_distance=8)),
        r"got max_distance=8 and a table of 32 rows.*larger than 8",
    ),
    (ShapeError, lambda: attended(biases.Buckets(np.ones(32))), r"\[R, N\].*got \(32,\)"),
    (
        ShapeError,
        lambda: attended(biases.Relative(np.ones((8, 6)))),
        r"an odd number of rows.*got \(8, 6\) with axes=None",
    ),
    (
        ShapeError,
        lambda: attended(biases.Relative(np.ones((13, 6)), (2, 3))),
        r"has 15 rows.*got \(13, 6\) with axes=\(2, 3\)",
    ),
    (ShapeError, lambda: attended(biases.Bias()), r"Bias is no pytree.*@mj\.biases\.pytree"),
    (NotImplementedError, lambda: attended(Silent()), r"Silent says nothing: write `logits"),
    (
        UnsupportedError,
        lambda: attended(biases.Alibi.of_heads(6), backend="pallas_tpu"),
        r"PallasTPU cannot run this call: it needs a TPU",
    ),
]


@pytest.mark.parametrize("error, make, sentence", WRONG)
def test_wrong_biases_are_explained(error, make, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_explain_says_who_adds_them():
    call = Call(X, X, X, bias=biases.Alibi.of_heads(6))
    says = mj.explain(call, "tpu")
    assert says["pallas_tpu"] == says["blockwise"] == says["reference"] == "can run"
    assert says["cudnn"].startswith("it has no biases by rule yet")


@biases.pytree
class OfHead(biases.OfDistance):
    """One number for every head, whatever the distance."""

    numbers: object

    def at(self, distance, head):
        return jnp.asarray(self.numbers)[head]


@biases.pytree
class Says(biases.Bias):
    what: object = biases.static()

    def logits(self, q, k):
        return self.what(q, k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_may_say_less_than_its_arguments(backend):
    numbers = jnp.asarray(draw(7, N))

    def loss(numbers, q, bias):
        arrays = q, *map(jnp.asarray, (KEYS, VALUES))
        options = {"mask": Causal(), "backend": BACKENDS[backend]}
        return (mj.dot_product_attention(*arrays, bias=bias(numbers), **options) ** 2).sum()

    def whole(numbers):
        return jnp.broadcast_to(numbers[None, :, None, None], (1, N, T, S))

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    for other in (OfHead, lambda x: Says(lambda q, k: 0.5) + OfHead(x)):
        got, want = gradient(numbers, Q, other), gradient(numbers, Q, whole)
        # The same for all keys of a row changes nothing.
        oracles.assert_close(got[0], np.zeros(N), 1e-5)
        oracles.assert_close(got[1], want[1], 1e-5)


@pytest.mark.parametrize(
    ("what", "got"),
    [
        (lambda q, k: None, "got NoneType"),
        (lambda q, k: jnp.ones((T, S)), r"got float32\[23, 29\]"),
        (lambda q, k: jnp.ones((3, 1, 1, 1)), r"got float32\[3, 1, 1, 1\]"),
        (lambda q, k: k.rows > q.rows, "got bool.*is a mask"),
        (lambda q, k: 1j * k.rows.astype(jnp.complex64), "got complex64"),
    ],
)
def test_rules_that_say_no_numbers_of_pairs_are_refused(what, got):
    for backend in (None, "reference", "blockwise"):
        with pytest.raises(ShapeError, match=rf"Says\.logits must return real numbers.*{got}"):
            mj.dot_product_attention(Q, KEYS, VALUES, bias=Says(what), backend=backend)


def test_rules_that_close_over_traced_values_are_refused():
    @biases.pytree
    class Above(mj.Mask):
        what: object = biases.static()

        def visible(self, q, k):
            return self.what(q, k)

    def floats(rows):
        return rows.astype(jnp.float32)

    def of_bias(x):
        return mj.dot_product_attention(
            Q, KEYS, VALUES, bias=Says(lambda q, k: x * floats(k.rows))
        ).sum()

    def of_mask(x):
        return mj.dot_product_attention(
            Q, KEYS, VALUES, mask=Above(lambda q, k: floats(k.rows) < x)
        ).sum()

    for of in (of_bias, of_mask):
        for transform in (jax.jit, jax.grad):
            with pytest.raises(ShapeError, match=r"closes over a traced value.*make it a field"):
                transform(of)(jnp.float32(3))


def test_arrays_and_sums_stand_on_either_side():
    rule, array = biases.Alibi(np.abs(draw(7, N))), draw(8, T, S)
    arrays = Q, KEYS, VALUES
    want = mj.dot_product_attention(*arrays, bias=rule + array)
    for bias in (array + rule, jnp.asarray(array) + rule, sum([rule, biases.Array(array)])):
        np.testing.assert_array_equal(mj.dot_product_attention(*arrays, bias=bias), want)
