"""Every public name has its place in the API reference, and every page is listed."""

import pathlib
import re
import runpy

import pytest

import mha_jax
from mha_jax import visualize

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.rst"))}


@pytest.mark.parametrize("module", [mha_jax, visualize], ids=lambda module: module.__name__)
def test_every_public_name_is_documented(module):
    text = "\n".join(PAGES.values())
    documented = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", text, re.MULTILINE))
    assert set(module.__all__) <= documented, sorted(set(module.__all__) - documented)


def test_every_page_is_listed():
    listed = set(re.findall(r"^   (\w+)$", PAGES["index"], re.MULTILINE))
    assert listed == set(PAGES) - {"index"}


def test_pictures_are_what_the_library_answers():
    draw = runpy.run_path(str(DOCS / "draw.py"))
    assert (DOCS / "images" / "call.svg").read_text("utf-8") == draw["the_way_of_a_call"]()
    assert (DOCS / "images" / "tiles.svg").read_text("utf-8") == draw["tiles"]()
