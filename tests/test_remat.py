"""What `jax.checkpoint` keeps of attention is what was named; complex numbers are refused at every door."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

import mha_jax as mj
from mha_jax.errors import ArgumentError, ShapeError
from mha_jax.models import transformer
from tests.drawn import draw, draw_variables

B, T, N, H, D = 2, 7, 3, 4, 5
X = draw(0, B, T, D)
LAYER = mj.MultiHeadAttention(num_heads=N, key_dim=H)
VARIABLES = draw_variables(LAYER, X, X)
SHAPES = {"q": f"[{B},{T},{N},{H}]", "k": f"[{B},{T},{N},{H}]", "v": f"[{B},{T},{N},{H}]"}
SHAPES |= {"out": f"[{B},{T},{N},{H}]", "lse": f"[{B},{N},{T}]"}


def loss(variables, x):
    return (
        jnp.sin(LAYER.apply(variables, jnp.sin(x), jnp.sin(x), use_causal_mask=True)) ** 2
    ).sum()


@pytest.mark.parametrize("save", [(), ("out", "lse"), ("q", "k"), "v"])
def test_what_is_kept_is_what_was_named(save, capsys):
    policy = mj.remat_policy(save)
    print_saved_residuals(jax.checkpoint(jax.jit(loss), policy=policy), VARIABLES, X)
    kept = [x for x in capsys.readouterr().out.splitlines() if "from the argument" not in x]
    kept = [x.split()[0] for x in kept if x and "constant" not in x]
    want = [SHAPES[name] for name in save] + [SHAPES["lse"]] * ("lse" in save)
    assert sorted(x.removeprefix("f32") for x in kept) == sorted(want)


def test_gradients_stay_and_other_policies_see_the_names():
    want = jax.grad(loss)(VARIABLES, X)
    for policy in (
        mj.remat_policy(),
        mj.remat_policy(("q", "k", "v", "out", "lse")),
        jax.checkpoint_policies.save_any_names_but_these("attention_q"),
    ):
        got = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy)))(VARIABLES, X)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_a_part_that_there_is_not_is_refused():
    with pytest.raises(
        ArgumentError, match=r"got 'scores'. Expected some of 'q', 'k', 'v', 'out', 'lse'"
    ):
        mj.remat_policy(("out", "scores"))


def test_complex_numbers_are_refused_in_words():
    z, q = X.astype(jnp.complex64), draw(1, B, T, N, H).astype(jnp.complex64)
    other = mj.nnx.MultiHeadAttention.from_linen(LAYER, VARIABLES, rngs=nnx.Rngs(0))
    for door in (
        lambda: LAYER.apply(VARIABLES, z, z),
        lambda: LAYER.apply(VARIABLES, X, z),
        lambda: other(z, z),
        lambda: mj.multi_head_attention(VARIABLES["params"], z, z),
        lambda: mj.dot_product_attention(q, q, q),
        lambda: mj.attend(mj.Call(q, q, q)),
        lambda: mj.attention_scores(mj.Call(q, q, q)),
        lambda: LAYER.init(jax.random.key(0), z, z),
        lambda: mj.dot_product_attention(*[q.real] * 3, bias=mj.biases.Alibi(np.ones(N, complex))),
        lambda: transformer.sinusoids(z, 4),
    ):
        with pytest.raises(ShapeError, match=r"complex.*real and imaginary parts as features"):
            door()
