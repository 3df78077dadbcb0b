"""Every sample of the guide runs, page by page, from first to last; every link leads somewhere."""

import importlib.util
import pathlib
import re

import jax
import pytest

from tests.test_readme import anchors

GUIDE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "guide"
PAGES = sorted(path.stem for path in GUIDE.glob("*.md"))
SAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
NEEDS = re.compile(r"# needs: (\w+)")


@pytest.fixture
def as_users_have_it():
    """Promotion is strict in our tests; in a user's process it is not."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("page", PAGES)
def test_samples(page, as_users_have_it, capsys):
    names = {"__name__": page}
    for sample in SAMPLE.findall((GUIDE / f"{page}.md").read_text()):
        needed = NEEDS.search(sample)
        if needed is None or importlib.util.find_spec(needed[1]):
            exec(compile(sample, f"{page}.md", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for link in re.findall(r"\]\(([\w./#-]+)\)", (GUIDE / f"{page}.md").read_text()):
        file, _, heading = link.partition("#")
        path = GUIDE / (file or f"{page}.md")
        assert path.is_file(), link
        assert not heading or heading in anchors(path.read_text()), link


# What someone who comes from another library asks first, and the heading or page that answers.
FIRST = {
    "pad a batch": "masks_and_tokens.md#a-padded-batch",
    "pack sequences": "masks_and_tokens.md#packed-sequences",
    "decode with a cache": "decoding.md",
    "add a bias": "masks_and_tokens.md#an-additive-bias",
    "load my weights": "#weights",
    "shard over devices": "many_devices.md",
    "see the scores": "looking_inside.md",
}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("from_")])
def test_who_comes_from_elsewhere_finds_every_first_answer_by_one_link(page):
    text = (GUIDE / f"{page}.md").read_text()
    assert not [what for what, link in FIRST.items() if f"[{what}]({link})" not in text]


def test_every_page_is_listed():
    index = (GUIDE.parent / "index.rst").read_text()
    assert set(re.findall(r"^   guide/(\w+)$", index, re.MULTILINE)) == set(PAGES)
