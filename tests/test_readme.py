"""The README's samples run, and its commands are those that CI runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def anchors(text):
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_samples_run_from_first_to_last():
    names = {}
    for sample in SAMPLES:
        exec(compile(sample, "README.md", "exec"), names)
    assert names["y"].shape == (2, 5, 16)
    assert names["out"].shape == (2, 1024, 8, 64)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_links_work_outside_the_clone_and_lead_to_files_in_it():
    ours = "https://(?:github|raw.githubusercontent|colab.research.google).com/(?:github/)?mha-jax/mha_jax/(?:blob/)?main/"
    links = re.findall(r"\]\((.*?)\)", README)
    assert links and all(link.startswith("https://") for link in links)
    for path in re.findall(rf"\]\({ours}(.*?)\)", README):
        file, _, heading = path.partition("#")
        assert (ROOT / file).is_file(), path
        assert not heading or heading in anchors((ROOT / file).read_text()), path


def test_two_commands_do_all_the_set_up():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].strip().splitlines()
    assert len(commands) == 2
    assert all(command.startswith("pip install -e ") for command in commands)
