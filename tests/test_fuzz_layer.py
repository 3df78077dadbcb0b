"""Random calls of the layer through its three doors against float64: a quarter of `--fuzz N`.

A call that falls is printed as Python that makes it again; those that once fell are kept below.
"""

import pytest

from tests.fuzz_layer import LayerCall, draw_layer_call
from tests.test_fuzz import TOGETHER, check

SEED = 2
KEPT = [
    # A mask over pairs of which there are none.
    LayerCall(
        seed=616721,
        shape=(2, 3, 0),
        axes=(1, 2),
        keys=(3, 0),
        heads=(2, 2),
        masks=(("attention_mask", "flags(223112, 2, 2, 1, 0, 3, 1)"),),
    ),
    LayerCall(seed=2, shape=(2, 0), masks=(("attention_mask", "flags(3, 2, 0, 7)"),)),
    # Rotary positions of no tokens: the number of pairs was left to be found.
    LayerCall(seed=3, shape=(0, 5), rotary="Rotary()"),
    LayerCall(seed=4, shape=(2, 0), rotary="Rotary(interleaved=True, fraction=0.5)"),
]


def pytest_generate_tests(metafunc):
    if "first" in metafunc.fixturenames:
        count = metafunc.config.getoption("--fuzz") // 4
        metafunc.parametrize("first", range(0, count, TOGETHER))


def test_random_calls_give_what_the_formula_gives(first):
    for index in range(first, first + TOGETHER):
        check(draw_layer_call(SEED, index))


@pytest.mark.parametrize("call", KEPT, ids=lambda call: str(call.seed))
def test_calls_that_fell(call):
    check(call)


def test_a_call_is_printed_as_python_that_makes_it_again():
    words = {"LayerCall": LayerCall, "nan": float("nan"), "inf": float("inf")}
    for index in range(64):
        call = draw_layer_call(SEED, index)
        assert repr(eval(repr(call), words)) == repr(call)
