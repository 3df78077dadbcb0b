"""The README's samples run, and its commands are those that CI runs."""

import pathlib
import re

import mha_jax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_samples_run_from_first_to_last():
    names = {}
    for sample in SAMPLES:
        if "keras_layer" not in sample:
            exec(compile(sample, "README.md", "exec"), names)
    assert names["y"].shape == (2, 5, 16)
    assert names["out"].shape == (2, 1024, 8, 64)


def test_names_in_the_keras_sample_exist():
    sample = next(sample for sample in SAMPLES if "keras_layer" in sample)
    for name in re.findall(r"mj\.interop\.keras\.(\w+)", sample):
        assert hasattr(mha_jax.interop.keras, name)


def test_two_commands_do_all_the_set_up():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].strip().splitlines()
    assert len(commands) == 2
    assert all(command.startswith("pip install -e ") for command in commands)
