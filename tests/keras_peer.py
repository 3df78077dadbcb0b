"""Keras's attention layers as a peer: on CPU, on the explicit path, as one pure function.

The explicit path is the one that returns scores; the fused one and what goes wrong on it is the business
of the tests that name it. What Keras cannot be asked for natively is folded into one dense mask.
"""

import contextlib
import warnings

import jax
import keras
import numpy as np

# Programs this small spend their time in compilation; these flags quarter it.
OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@contextlib.contextmanager
def lenient():
    """Let Keras promote dtypes and ranks, which this suite forbids, and warn of sizes of one."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)
        yield


class _Zeros(keras.initializers.Initializer):
    """Weights to overwrite; Keras's own initializers compile a program for every shape."""

    def __call__(self, shape, dtype=None):
        return jax.device_put(np.zeros(shape, dtype))


def build(grouped, arguments, query, value, key=None, seed=0):
    """Return a built Keras layer with random weights, biases too.

    Args:
      grouped: Whether to make a `GroupQueryAttention`.
      arguments: Of its constructor.
      query, value, key: Inputs; only shapes are read.
      seed: Of the weights.
    """
    kind = keras.layers.GroupQueryAttention if grouped else keras.layers.MultiHeadAttention
    rng = np.random.default_rng(seed)
    with lenient():
        layer = kind(**arguments)
        names = [f"{'' if grouped else '_'}{part}_initializer" for part in ("kernel", "bias")]
        initializers = {name: getattr(layer, name) for name in names}
        for name in names:
            setattr(layer, name, _Zeros())
        layer.build(query.shape, value.shape, None if key is None else key.shape)
        for name, initializer in initializers.items():
            setattr(layer, name, initializer)
        for variable in layer.trainable_variables:
            new = 0.5 * rng.standard_normal(variable.shape)
            variable.assign(jax.device_put(new.astype(variable.dtype)))
    return layer


def weights(layer):
    """Return {projection: {"kernel": ..., "bias": ...}} as NumPy."""
    params = {}
    for variable in layer.trainable_variables:
        *_, name, part = variable.path.split("/")
        params.setdefault(name, {})[part] = np.asarray(variable)
    return params


@contextlib.contextmanager
def _without_window(layer, active):
    name = "sliding_window" if hasattr(layer, "sliding_window") else "_sliding_window"
    window = getattr(layer, name)
    if active:
        setattr(layer, name, None)
    yield
    setattr(layer, name, window)


def run(layer, inputs, options, d_output, d_scores, *, dense):
    """Return what `layer_oracle.layer` returns, by Keras; scores as Keras lays them out.

    Args:
      layer: A built layer.
      inputs: {"query": ..., "value": ..., maybe "key": ...}.
      options: Masks and switches of the call.
      d_output, d_scores: Cotangents; that of the scores may be None.
      dense: Whether `options` hold the window too, in one dense mask.
    """
    names = [tuple(v.path.split("/")[-2:]) for v in layer.trainable_variables]
    fixed = [v.value for v in layer.non_trainable_variables]
    values = [v.value for v in layer.trainable_variables]
    constraints = [v.constraint for v in layer.trainable_variables]

    query_mask = options.get("query_mask")

    def loss(values, inputs):
        # Keras's MultiHeadAttention heeds no query_mask argument, only what hangs on the tensor.
        if query_mask is not None:
            keras.src.backend.set_keras_mask(inputs["query"], query_mask)
        (output, scores), _, losses = layer.stateless_call(
            values,
            fixed,
            *(inputs[n] for n in ("query", "value")),
            key=inputs.get("key"),
            return_attention_scores=True,
            return_losses=True,
            **options,
        )
        total = (output * d_output).sum() + sum(losses)
        if d_scores is not None:
            total = total + (scores * d_scores).sum()
        kept = [w if rule is None else rule(w) for rule, w in zip(constraints, values)]
        return total, (output, scores, losses, kept)

    with lenient(), _without_window(layer, dense):
        function = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=OPTIONS)
        (by_weight, by_input), (output, scores, losses, kept) = function(values, inputs)
    result = {"output": output, "scores": scores, "losses": np.sort([float(x) for x in losses])}
    result |= {f"gradient {name}": x for name, x in by_input.items()}
    for (name, part), gradient, new in zip(names, by_weight, kept):
        result[f"gradient {name} {part}"] = gradient
        result[f"constrained {name} {part}"] = new
    return {name: np.asarray(x) for name, x in result.items()}
