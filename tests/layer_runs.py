"""Run a case of `layer_cases` by the oracle, by Keras and by us: three results of one form."""

import jax
import numpy as np

from tests import keras_peer, layer_oracle


def by_oracle(case, params):
    """Return the results in float64 NumPy."""
    rules = {
        name: value and (value["config"] if name.endswith("regularizer") else value)
        for name, value in case.arguments.items()
        if name.endswith(("regularizer", "constraint"))
    }
    visible = case.visible()
    result = layer_oracle.layer(
        params,
        **{"key": None, **case.inputs},
        axes=case.axes,
        visible=visible,
        rules=rules,
        d_output=case.d_output,
        d_scores=None if case.d_scores is None else case.d_scores.reshape(visible.shape),
    )
    result["scores"] = result["scores"].reshape(case.scores_shape)
    return result


def by_peer(case, layer):
    """Return the results of a Keras layer."""
    options = {**case.masks, "use_causal_mask": case.causal}
    if not case.native:
        options = {"attention_mask": case.visible().reshape(case.scores_shape)}
    return keras_peer.run(
        layer, case.inputs, options, case.d_output, case.d_scores, dense=not case.native
    )


def by_us(case, module, params):
    """Return the results of our module, in the dtype of the parameters and inputs."""

    def loss(params, inputs):
        results, state = module.apply(
            {"params": params},
            **inputs,
            **case.masks,
            use_causal_mask=case.causal,
            return_attention_scores=case.scores,
            mutable=["losses"],
        )
        output, scores = results if case.scores else (results, None)
        losses = jax.tree.leaves(state.get("losses", {}))
        total = (output * case.d_output).sum() + sum(losses)
        if case.scores:
            total = total + (scores * case.d_scores).sum()
        return total, (output, scores, losses, module.constrain(params))

    function = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=keras_peer.OPTIONS)
    (by_weight, by_input), (output, scores, losses, kept) = function(params, case.inputs)
    result = {"output": output, "losses": np.sort([float(x) for x in losses])}
    if case.scores:
        result["scores"] = scores
    result |= {f"gradient {name}": x for name, x in by_input.items()}
    for what, tree in (("gradient", by_weight), ("constrained", kept)):
        for name, group in tree.items():
            result |= {f"{what} {name} {part}": x for part, x in group.items()}
    return {name: np.asarray(x) for name, x in result.items()}


def error(got, want, what):
    """Return the root mean square error; raise on another shape or a number that is none."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert np.isfinite(got).all(), f"{what}: NaN or infinity"
    return float(np.sqrt(np.mean((got - want) ** 2))) if want.size else 0.0
