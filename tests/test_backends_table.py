"""A backend that is added to the product's table is run by every test file, and a wrong one fails in each."""

import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
# Of every file that runs over the table a quick test that a wrong backend cannot pass.
FAILING = {
    "test_attention.py::test_every_option_means_what_the_oracle_says[wrong-options0-meaning0]",
    "test_backends.py::test_backend_agrees_with_the_oracle[wrong-full]",
    "test_biases.py::test_outputs_and_gradients_agree_with_the_oracle[alibi-wrong]",
    "test_constant_bias.py::test_the_other_gradients_are_the_same[wrong-array]",
    "test_dropout.py::test_every_backend_and_tile_size_has_the_same_bits[wrong]",
    "test_fully_masked.py::test_nothing_comes_out_and_nothing_flows_back[wrong-dense]",
    "test_one_answer.py::test_one_answer[none]",
    "test_poison.py::test_a_hidden_key_changes_no_bit_and_a_seen_one_changes_something[wrong-causal]",
    "test_precision.py::test_half_precision_is_the_float32_result_rounded[wrong-float16-1.0]",
    "test_programs.py::test_a_program_gives_what_the_formula_gives[disable_jit-wrong-plain]",
    "test_sinks.py::test_sinks_and_their_gradients_agree_with_the_oracle[soft_cap-wrong]",
}


def test_a_wrong_backend_in_the_table_fails_everywhere():
    ids = [str(HERE / name) for name in sorted(FAILING)]
    options = ["-q", "-rf", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "tests.wrong_backend"]
    # What the run around this one reports, and where to, is its own.
    environment = {name: x for name, x in os.environ.items() if name != "PYTEST_ADDOPTS"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *ids],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = set(re.findall(r"^FAILED tests/(\S+?)(?: - .*)?$", run.stdout, re.MULTILINE))
    assert failed == FAILING, run.stdout[-2000:]


def test_every_file_that_names_backends_is_in_the_list():
    files = {path.name for path in HERE.glob("test_*.py")}
    over = {
        name for name in files if re.search(r"^BACKENDS\b", (HERE / name).read_text(), re.MULTILINE)
    }
    assert over == {name.split("::")[0] for name in FAILING}
