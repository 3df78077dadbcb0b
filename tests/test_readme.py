"""The README's samples run, and its commands are those that CI runs."""

import pathlib
import re

import pytest

import mha_jax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


# Samples of other libraries' objects, which stand for the reader's own.
FOREIGN = {"keras": "keras_layer", "torch": "state_dict"}


def test_the_samples_run_from_first_to_last():
    names = {}
    for sample in SAMPLES:
        if not any(name in sample for name in FOREIGN.values()):
            exec(compile(sample, "README.md", "exec"), names)
    assert names["y"].shape == (2, 5, 16)
    assert names["out"].shape == (2, 1024, 8, 64)


@pytest.mark.parametrize("library", FOREIGN)
def test_names_in_the_samples_of_other_libraries_exist(library):
    sample = next(sample for sample in SAMPLES if FOREIGN[library] in sample)
    found = re.findall(rf"mj\.interop\.{library}\.(\w+)", sample)
    assert len(found) >= 2
    for name in found:
        assert hasattr(getattr(mha_jax.interop, library), name)


def test_two_commands_do_all_the_set_up():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].strip().splitlines()
    assert len(commands) == 2
    assert all(command.startswith("pip install -e ") for command in commands)
