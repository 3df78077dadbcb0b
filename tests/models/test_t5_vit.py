"""T5 and the Vision Transformer against `transformers`, from small weights drawn here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mha_jax import ShapeError, UnsupportedError, WeightsError
from mha_jax.models import t5, vit

T5 = {
    "vocab_size": 37,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
}
MASK = np.arange(17)[None] < np.array([[17], [6]])


def drawn(torch, theirs):
    """Return PyTorch's model with drawn weights, and these by name."""
    draw = np.random.default_rng(1).standard_normal
    with torch.no_grad():
        for x in theirs.parameters():
            x.copy_(torch.from_numpy(0.3 * draw(tuple(x.shape), np.float32)))
    return theirs.eval(), {name: x.numpy() for name, x in theirs.state_dict().items()}


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers", reason="transformers is absent: pip install transformers")
    return pytest.importorskip("torch", reason="torch is absent: pip install torch")


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5_gives_its_logits(torch, kind):
    import transformers

    untied = (
        {"tie_word_embeddings": False, "scale_decoder_outputs": False} if kind != "relu" else {}
    )
    config = transformers.T5Config(**T5, feed_forward_proj=kind, **untied)
    theirs, tensors = drawn(torch, transformers.T5ForConditionalGeneration(config))
    model, variables = t5.read(config.to_dict(), tensors)
    source, target = np.random.default_rng(2).integers(0, 37, (2, 2, 17))
    target = target[:, :7]
    inputs = {"input_ids": source, "attention_mask": MASK.astype(int), "decoder_input_ids": target}
    want = (
        theirs(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits.detach().numpy()
    )
    got = jax.jit(model.apply)(variables, source, target, MASK)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)

    memory = model.apply(variables, source, MASK, method="encode")
    caches = model.empty_caches(batch=2, length=7, memory_length=17)
    pieces = []
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        args = (target[:, part], memory, MASK, caches)
        piece, caches = model.apply(variables, *args, method="decode")
        memory = None
        pieces.append(piece)
    np.testing.assert_allclose(np.concatenate(pieces, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_vit_gives_its_logits(torch, qkv_bias):
    import transformers

    sizes = {"image_size": 12, "patch_size": 4, "num_channels": 2, "num_labels": 5}
    sizes |= {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"qkv_bias": qkv_bias}
    config = transformers.ViTConfig(**sizes, intermediate_size=20)
    theirs, tensors = drawn(torch, transformers.ViTForImageClassification(config))
    model, variables = vit.read(config.to_dict(), tensors)
    images = np.random.default_rng(2).standard_normal((2, 12, 12, 2), np.float32)
    want = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.detach().numpy()
    np.testing.assert_allclose(model.apply(variables, images), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, other", [("relu", "gated-gelu"), ("gated-gelu", "relu")])
def test_weights_of_the_other_feed_forward_layers_are_refused(torch, kind, other):
    import transformers

    config = transformers.T5Config(**T5, feed_forward_proj=kind)
    _, tensors = drawn(torch, transformers.T5ForConditionalGeneration(config))
    published = {**T5, "model_type": "t5", "feed_forward_proj": kind}
    assert t5.read(published, tensors)[0].config.gated == (kind != "relu")
    with pytest.raises(WeightsError, match=r"there is no tensor .*DenseReluDense\.wi"):
        t5.read(published | {"feed_forward_proj": other}, tensors)
    with pytest.raises(UnsupportedError, match=r"the config has (dense_act_fn|is_gated_act)="):
        t5.config_of(config.to_dict() | {"feed_forward_proj": other})
    with pytest.raises(UnsupportedError, match="the config has dense_act_fn='silu', where"):
        t5.config_of(published | {"dense_act_fn": "silu"})


def test_configs_of_others_are_told_so():
    with pytest.raises(
        UnsupportedError, match=r"family 'bert'.*expected t5 with relu or gated-gelu"
    ):
        t5.read({"model_type": "bert"}, {})
    with pytest.raises(UnsupportedError, match=r"family 'swin'.*expected vit"):
        vit.read({"model_type": "swin"}, {})
    with pytest.raises(ShapeError, match="patch must divide image: got patch=5 and image=12"):
        vit.Config(image=12, patch=5)
    with pytest.raises(
        ShapeError, match=r"images must be \[B, rows, columns, channels\].*\(2, 9, 9, 3\)"
    ):
        model = vit.ViT(vit.Config(image=12, patch=4, layers=0))
        model.init(jax.random.key(0), np.zeros((2, 9, 9, 3), np.float32))


SMALL_VIT = vit.ViT(vit.Config(5, image=12, patch=4, width=8, num_heads=2, hidden=16, layers=1))


def test_no_images_have_no_logits():
    variables = SMALL_VIT.init(jax.random.key(0), jnp.ones((1, 12, 12, 3)))
    assert SMALL_VIT.apply(variables, jnp.ones((0, 12, 12, 3))).shape == (0, 5)


def test_images_that_lie_over_devices_along_explicit_axes():
    images = np.random.default_rng(0).standard_normal((8, 12, 12, 3)).astype(np.float32)
    variables = SMALL_VIT.init(jax.random.key(0), images)
    want = SMALL_VIT.apply(variables, images)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    whole = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    cut = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    got = jax.jit(SMALL_VIT.apply)(whole, cut)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("caches", [(), (1,), ((1, 2),)])
def test_caches_that_are_none_of_the_model_are_refused(caches):
    model, one = t5.T5(t5.Config(11, 8, 16, 2, 4, 1, 1)), np.ones((1, 3), int)
    variables = model.init(jax.random.key(0), one, one)
    memory = model.apply(variables, one, method="encode")
    with pytest.raises(ShapeError, match=r"caches must be a pair for each of the 1 layers"):
        model.apply(variables, one, memory, None, caches, method="decode")
