"""Random calls against the formula in float64: hundreds here, as many as are asked for with `--fuzz N`.

A call that falls is printed as Python that makes it again; those that once fell are kept below.
"""

import pytest

from tests.fuzz_calls import FunctionCall, draw_function_call

SEED = 2
TOGETHER = 4  # calls of one program
KEPT = [
    # Rows whose largest weight is not exactly 1, for their logits are large: they were divided by 1.
    FunctionCall(
        seed=878234,
        backend="blockwise",
        lead=(),
        lengths=(3, 11),
        heads=(6, 3),
        sizes=(4, 4),
        magnitudes=(1.0, 1000.0, 1000000.0),
        mask="(Full() & ValidKeys())",
        q_tokens="Tokens(3, start=2147483584, index=ints(26665, -3, 20, 3), valid=flags(755785, 3))",
        k_tokens="Tokens(11, pos=ints(887589, -2147483648, 2147483648, 11), valid=flags(640325, 11))",
        bias="Array(either(143033, -1000000000.0, 6, 3, 11))",
        rate=0.5,
        scale=0.3,
        scores=True,
    ),
    # Gradients of returned scores beside sinks: the largest logit counted twice.
    FunctionCall(seed=1, lead=(2,), lengths=(5, 4), heads=(3, 1), sinks=True, scores=True),
    FunctionCall(seed=2, lengths=(3, 0), sinks=True, scores=True),
    # A prefix that is a Python integer, where integers have 64 bits.
    FunctionCall(seed=3, mask="PrefixLM(3)", dtype="float64"),
    # Two biases of 32 bits, whose sum was rounded to 32 bits beside logits of 64.
    FunctionCall(
        seed=4,
        backend="tiles_4_4",
        dtype="float64",
        bias="Array(either(5, -1e9, 5, 7)) + Array(either(6, 1e6, 5, 7))",
    ),
    # Logits whose last bit is 1e9, or 64, when they are computed again: weights overflowed.
    FunctionCall(
        seed=18023,
        backend="tiles_4_4",
        lead=(1,),
        lengths=(7, 5),
        heads=(4, 2),
        sizes=(7, 3),
        magnitudes=(1e12, 1.0, 1e-30),
        mask="(Full() & PrefixLM(ints(775378, 0, 7, 1)))",
        k_tokens="Tokens(5, start=3, valid=flags(472408, 1, 5))",
        scale=10000.0,
        traced=True,
    ),
    FunctionCall(
        seed=501441,
        backend="one_pair",
        lead=(2, 3),
        lengths=(17, 5),
        heads=(5, 5),
        sizes=(7, 1),
        magnitudes=(1e6, 1e3, 1e18),
        traced=True,
    ),
    # Rows whose largest logit is the smallest number: hidden keys weighed as much.
    FunctionCall(
        seed=898674,
        lengths=(11, 2),
        mask="ChunkedCausal(1)",
        q_tokens="Tokens(11, pos=ints(851519, -3, 9, 11))",
        bias="Array(either(890607, -3.4028234663852886e+38, 11, 2))",
        poison=1e18,
    ),
]


def pytest_generate_tests(metafunc):
    if "first" in metafunc.fixturenames:
        metafunc.parametrize("first", range(0, metafunc.config.getoption("--fuzz"), TOGETHER))


def check(call):
    try:
        call.check()
    except Exception as error:
        module = type(call).__module__
        lines = f"{error}\n\nfrom {module} import *\n{call!r}.check()"
        raise AssertionError(lines) from error


def test_random_calls_give_what_the_formula_gives(first):
    for index in range(first, first + TOGETHER):
        check(draw_function_call(SEED, index))


@pytest.mark.parametrize("call", KEPT, ids=lambda call: str(call.seed))
def test_calls_that_fell(call):
    check(call)


def test_a_call_is_printed_as_python_that_makes_it_again():
    words = {"FunctionCall": FunctionCall, "nan": float("nan"), "inf": float("inf")}
    for index in range(64):
        call = draw_function_call(SEED, index)
        assert repr(eval(repr(call), words)) == repr(call)
