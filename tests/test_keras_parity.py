"""The layer against Keras, over all arguments together, and alone where Keras contradicts itself.

`MHA_JAX_PARITY_SEED=random` (or a number) draws fresh configurations, `MHA_JAX_PARITY_COUNT` more of them.
"""

import os
import secrets

import jax
import numpy as np
import pytest

from mha_jax.interop.keras import import_layer
from tests import keras_peer, layer_cases
from tests.layer_runs import by_oracle, by_peer, by_us, error

_GIVEN = os.environ.get("MHA_JAX_PARITY_SEED", "20261122")
SEED = secrets.randbelow(2**32) if _GIVEN == "random" else int(_GIVEN)
COUNT = int(os.environ.get("MHA_JAX_PARITY_COUNT", "120"))
CHUNK = 20
# Half an ulp of the largest number of its kind: what rounding a float32 result once may cost.
ROUNDING = 2.0**-24


def kind(name):
    """Return the kind of a quantity: errors of one kind are compared with each other."""
    first, *rest = name.split()
    if first != "gradient":
        return first
    return f"gradient of a {rest[-1]}" if len(rest) > 1 else "gradient of an input"


@pytest.mark.parametrize("chunk", range(-(-COUNT // CHUNK)))
def test_everything_equals_keras(chunk):
    """Against float64, ours errs at most twice as much as Keras.

    In every configuration, by the root mean square over all its quantities, where one rounding is the
    least that either is held to; over the configurations of a chunk, for every kind of quantity by
    itself and for the worst of all, without that allowance.
    """
    errors: dict[str, list[tuple[float, float, str]]] = {}
    for index in range(chunk * CHUNK, min(COUNT, (chunk + 1) * CHUNK)):
        case = layer_cases.draw(SEED, index)
        layer = keras_peer.build(case.grouped, case.arguments, **case.inputs, seed=index)
        truth = by_oracle(case, keras_peer.weights(layer))
        theirs = by_peer(case, layer)
        module, variables = import_layer(layer)
        ours = by_us(case, module, variables["params"])
        if not case.scores:
            del truth["scores"], theirs["scores"]
        assert set(ours) == set(theirs) == set(truth)
        sizes: dict[str, float] = {}
        pairs = []
        for name, x in truth.items():
            sizes[kind(name)] = max(sizes.get(kind(name), 0.0), np.abs(x).max(initial=0.0))
        for name, x in truth.items():
            size, where = sizes[kind(name)] or 1.0, f"{name} of case ({SEED}, {index})"
            pair = error(ours[name], x, where) / size, error(theirs[name], x, where) / size
            errors.setdefault(kind(name), []).append((*pair, where))
            pairs.append(pair)
        mine, keras = np.sqrt(np.mean(np.square(pairs), axis=0))
        assert mine <= 2 * max(keras, ROUNDING), (
            f"case ({SEED}, {index}): error {mine:.3g}, Keras {keras:.3g}"
        )
    for what, found in errors.items():
        mine, keras = (np.sqrt(np.mean([pair[i] ** 2 for pair in found])) for i in (0, 1))
        worst = max(found)[2]
        assert mine <= 2 * keras, f"{what}: error {mine:.3g}, Keras {keras:.3g}; worst in {worst}"
    everything = [pair for found in errors.values() for pair in found]
    worst, keras = max(everything), max(pair[1] for pair in everything)
    assert worst[0] <= 2 * keras, f"error {worst[0]:.3g} in {worst[2]}; worst of Keras {keras:.3g}"


def test_cases_cover_the_arguments():
    """A generator that stopped drawing something would make the test above hollow."""
    cases = [layer_cases.draw(20261122, index) for index in range(120)]
    seen = {
        "grouped": sum(c.grouped for c in cases),
        "several axes": sum(len(c.axes) > 1 for c in cases),
        "other extents": sum(c.split("query")[1] != c.split("value")[1] for c in cases),
        "asked of Keras natively": sum(c.native for c in cases),
        "causal over several axes": sum(c.causal and len(c.axes) > 1 for c in cases),
        "masked rows": sum(not c.visible().any(-1).all() for c in cases),
        "separate keys": sum("key" in c.inputs for c in cases),
        "batch of one": sum(c.inputs["query"].shape[0] == 1 for c in cases),
        "value_dim": sum(
            c.arguments.get("value_dim") not in (None, c.arguments.get("key_dim")) for c in cases
        ),
        "tuple outputs": sum(isinstance(c.arguments.get("output_shape"), tuple) for c in cases),
        "scores": sum(c.scores for c in cases),
    }
    seen |= {m: sum(m in c.masks for c in cases) for m in ("query_mask", "value_mask", "key_mask")}
    ranks = {
        (c.inputs["query"].ndim, c.masks["attention_mask"].ndim)
        for c in cases
        if "attention_mask" in c.masks
    }
    assert min(seen.values()) >= 10, seen
    assert {(3, 2), (3, 3), (3, 4)} <= ranks and len(ranks) > 8, ranks
    for name in cases[1].arguments:
        values = {str(c.arguments[name]) for c in cases if name in c.arguments}
        assert len(values) >= 2, f"{name} takes only {values}"


def test_a_case_is_a_function_of_seed_and_index():
    one, same, other = (layer_cases.draw(*at) for at in ((3, 5), (3, 5), (4, 5)))
    assert one.arguments == same.arguments
    jax.tree.map(np.testing.assert_array_equal, (one.inputs, one.masks), (same.inputs, same.masks))
    assert one.arguments != other.arguments
