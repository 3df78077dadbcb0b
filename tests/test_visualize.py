"""Pictures have the labels and values they were given, refuse what they cannot draw, and matplotlib
is loaded for them alone."""

import base64
import html.parser
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

import mha_jax as mj
from mha_jax import visualize
from mha_jax.errors import ShapeError
from mha_jax.visualize.pictures import Picture, blocks_of_maxima


def scores(heads=3, rows=4, columns=5):
    drawn = np.random.default_rng(0).random((heads, rows, columns), np.float32)
    return drawn / drawn.sum(-1, keepdims=True)


def svg(draw, *arguments, path, **options):
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        assert draw(*arguments, path=path, **options) is None
    return path.read_text()


def shown(picture):
    """Return the maps of a picture, in order."""
    return [np.asarray(image.get_array()) for axes in picture.axes for image in axes.images]


LABELS = {"queries": ["AE", "K", "T", "end"], "keys": list("cater")}


@pytest.mark.parametrize("heads", [1, 3, 4, 7])
@pytest.mark.parametrize("draw", [visualize.alignment, visualize.heads])
def test_picture_names_rows_columns_and_heads(tmp_path, draw, heads):
    names = {"query_name": "phoneme", "key_name": "letter", "title": "cater: K EY T ER"}
    text = svg(draw, scores(heads), path=tmp_path / "map.svg", **LABELS, **names)
    for label in ("cater: K EY T ER", "phoneme", "letter", "attention weight", ">AE<", ">r<"):
        assert label in text
    assert f"head {heads - 1}<" in text and f"head {heads}<" not in text


@pytest.mark.parametrize(
    ("draw", "values"),
    [
        (visualize.heads, scores()),
        (visualize.heads, scores()[0]),
        (visualize.layers, [scores(), scores()]),
        (visualize.entropy, [scores(), scores()]),
        (visualize.by_query, scores()[:, :, 0]),
    ],
    ids=["heads", "mean", "layers", "entropy", "by_query"],
)
def test_a_file_is_written_or_a_figure_returned(tmp_path, draw, values):
    assert draw(values, tmp_path / "map.png") is None
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    picture = draw(values)
    assert isinstance(picture, Picture)
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_heads_show_the_scores():
    picture = visualize.heads(jnp.asarray(scores(), jnp.float32), **LABELS)
    np.testing.assert_array_equal(np.stack(shown(picture)), scores())


def test_a_mean_over_heads_is_one_map():
    (drawn,) = shown(visualize.heads(scores().mean(0)))
    np.testing.assert_array_equal(drawn, scores().mean(0))


def test_alignment_shows_the_mean_then_the_heads():
    first, *heads = shown(visualize.alignment(scores(), **LABELS))
    np.testing.assert_array_equal(first, scores().mean(0))
    np.testing.assert_array_equal(np.stack(heads), scores())


def test_bfloat16_scores_are_drawn():
    assert len(shown(visualize.heads(jnp.asarray(scores(), jnp.bfloat16)))) == 3


def test_dollar_signs_and_blanks_are_text(tmp_path):
    labels = {"queries": ["$5", "$x_2$", " ", "\n"], "keys": list("cater")}
    text = svg(visualize.heads, scores(), path=tmp_path / "map.svg", **labels)
    for label in (">$5<", ">$x_2$<", ">␣<", ">↵<"):
        assert label in text


def test_many_labels_are_thinned(tmp_path):
    labels = [f"t{i}." for i in range(150)]
    text = svg(
        visualize.heads, scores(1, 150, 150), path=tmp_path / "map.svg", queries=labels, keys=labels
    )
    written = [label for label in labels if f">{label}<" in text]
    assert "t0." in written and 20 < len(written) < 100


def test_a_long_map_keeps_every_line():
    thin = np.zeros((1, 3000, 3000))
    thin[0, np.arange(3000), np.arange(3000)] = 1
    (drawn,) = shown(visualize.heads(thin))
    assert max(drawn.shape) <= 768
    assert (np.diag(drawn) == 1).all()
    assert blocks_of_maxima(np.arange(7.0)[None], 3).tolist() == [[2, 5, 6]]


def test_layers_are_rows_and_heads_columns(tmp_path):
    values = np.stack([scores(2), scores(2)[::-1]])
    text = svg(visualize.layers, values, path=tmp_path / "map.svg", names=["first", "last"])
    for label in (">first<", ">last<", ">head 0<", ">head 1<"):
        assert label in text
    np.testing.assert_array_equal(
        np.stack(shown(visualize.layers(values))).reshape(values.shape), values
    )


def test_layers_may_differ_in_length():
    assert len(shown(visualize.layers([scores(2, 3, 4), scores(2, 5, 7)]))) == 4


def test_entropy_of_scores_is_that_of_the_reduction():
    q, k = (jax.random.normal(jax.random.key(i), (1, 7, 3, 4)) for i in range(2))
    call = mj.Call(q, k, k, mask=mj.Causal())
    (of_scores,) = shown(visualize.entropy([mj.attention_scores(call)[0]]))
    (of_entropies,) = shown(visualize.entropy([mj.scores_entropy(call)[0]]))
    np.testing.assert_allclose(of_scores, of_entropies, rtol=1e-5)
    np.testing.assert_allclose(of_entropies[0], mj.scores_entropy(call)[0].mean(-1), rtol=1e-6)


def test_entropy_writes_its_numbers(tmp_path):
    text = svg(visualize.entropy, [np.full((2, 3, 4), 0.25)], path=tmp_path / "map.svg")
    assert text.count(">1.39<") == 2 and ">layer 0<" in text and "entropy (nats)" in text


def test_by_query_draws_a_row_a_head_in_blocks():
    values = np.repeat(np.arange(2000.0)[None], 2, 0)
    (drawn,) = shown(visualize.by_query(values, name="largest weight"))
    assert drawn.shape == (2, 667)
    np.testing.assert_allclose(drawn[0, :2], [1, 4])


def test_top_keys_are_points_where_the_keys_are():
    x = jax.random.normal(jax.random.key(0), (1, 50, 2, 4))
    weights, places = mj.scores_top_k(mj.Call(x, x, x, mask=mj.Causal()), 2)
    picture = visualize.top_keys(weights[0], places[0], length=50)
    points = np.asarray(picture.axes[0].collections[0].get_offsets(), int)
    expected = {
        (int(key), query)
        for query in range(50)
        for key, weight in zip(places[0, 0, query], weights[0, 0, query])
        if weight > 0
    }
    assert {tuple(point) for point in points.tolist()} == expected


def test_masks_show_what_is_visible():
    rules = {"Causal()": mj.Causal(), "ValidKeys()": mj.ValidKeys()}
    tokens = mj.Tokens(5, valid=np.arange(5)[None] < 3)
    causal, valid = shown(visualize.masks(rules, tokens))
    np.testing.assert_array_equal(causal, np.tril(np.ones((5, 5))))
    np.testing.assert_array_equal(valid, np.tile(np.arange(5) < 3, (5, 1)))


def test_curves_are_drawn(tmp_path):
    text = svg(visualize.curves, {"phoneme_error": ([0, 9], [1.0, 0.1])}, path=tmp_path / "c.svg")
    assert ">phoneme error<" in text
    assert isinstance(visualize.curves({"loss": ([0], [1.0])}), Picture)


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_carries_the_weights_and_loads_nothing():
    values = scores()
    text = visualize.html(values, queries=["<b>", "K", "T", "&"], keys=list("cater"))._repr_html_()
    assert "http" not in text and "src=" not in text and "@import" not in text
    assert "&lt;b&gt;" in text and "<b>K" not in text
    data = json.loads(re.search(r"const data = (\{.*\});", text)[1])
    levels = np.frombuffer(base64.b64decode(data["bytes"]), np.uint8).reshape(data["shape"])
    expected = np.concatenate([values.mean(0, keepdims=True), values])
    np.testing.assert_allclose(levels / 255 * data["scale"], expected, atol=data["scale"] / 500)


MARKUP = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "\"' onmouseover=alert(1) x='",
    "{{constructor}} ${alert(1)} `\\`",
    "\u2028\u2029</style>",
    "&lt;b&gt;",
]


class Tags(html.parser.HTMLParser):
    """Collects the tags, the attributes and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.handlers, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("place", ["queries", "keys", "query_name", "key_name"])
def test_labels_with_markup_stay_text(place):
    given = {"queries": ["a"] * 8, "keys": ["b"] * 8, "query_name": "c", "key_name": "d"}
    plain = visualize.html(np.ones((1, 8, 8)), **given).text
    given[place] = "".join(MARKUP) if place.endswith("name") else MARKUP
    text = visualize.html(np.ones((1, 8, 8)), **given).text
    before, after = Tags(plain), Tags(text)
    assert after.tags == before.tags and after.handlers == before.handlers
    shown = "".join(after.text)
    assert all(label in shown for label in MARKUP if "\u2028" not in label)
    assert text.count("<script") == 1 and text.count("</script") == 1 and "<!--" not in text


def test_the_page_shows_the_first_query_without_scripts():
    values = scores()
    text = visualize.html(values, **LABELS).text
    keys = text.split('<div class="keys">')[1].split("</div>")[0]
    written = re.findall(r"<small>(\d+)</small>", keys)
    assert written == [f"{100 * weight:.0f}" for weight in values.mean(0)[0]]


def test_the_page_is_written_to_a_file(tmp_path):
    assert visualize.html(scores(), tmp_path / "page.html") is None
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


# ---- what cannot be drawn ----------------------------------------------------------------------

BAD = {
    "batch axis": (
        lambda: visualize.heads(np.ones((1, 2, 3, 4))),
        r"scores must be \[N, T, S\]: got shape \(1, 2, 3, 4\).*scores\[0\] picks the first",
    ),
    "empty": (lambda: visualize.heads(np.ones((2, 0, 4))), r"\(2, 0, 4\) hold nothing to draw"),
    "logits": (
        lambda: visualize.heads(np.full((1, 2, 2), -3.0)),
        r"finite and not negative: got -3.0 to -3.0. Pass weights after the softmax",
    ),
    "nan": (lambda: visualize.html(np.full((1, 2, 2), np.nan)), "finite and not negative: got nan"),
    "layers as one array": (
        lambda: visualize.entropy(np.ones((2, 3, 4))),
        r"a list with one array for each layer: got one array of shape \(2, 3, 4\).*\[layers\]",
    ),
    "no layer": (lambda: visualize.layers([]), r"a list with one array for each layer: got \[\]"),
    "layers of another rank": (
        lambda: visualize.layers([np.ones((2, 3))]),
        r"scores\[0\] must be \[N, T, S\]: got shape \(2, 3\)",
    ),
    "entropies of another rank": (
        lambda: visualize.entropy([np.ones(3)]),
        r"layers\[0\] must be \[N, T, S\] or \[N, T\]: got shape \(3,\)",
    ),
    "layers with a batch axis": (
        lambda: visualize.entropy([np.ones((1, 2, 3, 4))]),
        r"layers\[0\] must be \[N, T, S\] or \[N, T\]: got shape \(1, 2, 3, 4\)",
    ),
    "heads that differ": (
        lambda: visualize.layers([scores(2), scores(3)]),
        r"same heads: got 2 in scores\[0\] and 3 in scores\[1\]",
    ),
    "names": (
        lambda: visualize.layers([scores()], names=["a", "b"]),
        "got 2 names for 1 layers. Expected one for each",
    ),
    "values by query": (lambda: visualize.by_query(np.ones(3)), r"values must be \[N, T\]"),
    "top_k of another shape": (
        lambda: visualize.top_keys(np.ones((2, 3, 1)), np.ones((2, 3))),
        r"two arrays of scores_top_k: got shapes \(2, 3, 1\) and \(2, 3\)",
    ),
    "a key that is not there": (
        lambda: visualize.top_keys(np.ones((1, 2, 1)), np.full((1, 2, 1), 9), length=5),
        "keys from 0 to 4: got 9 to 9. Pass length=S",
    ),
    "places that are no integers": (
        lambda: visualize.top_keys(np.ones((1, 2, 1)), np.full((1, 2, 1), np.nan)),
        "places must be numbers of keys, integers: got float64",
    ),
    "a length that is none": (
        lambda: visualize.top_keys(np.ones((1, 2, 1)), np.ones((1, 2, 1), int), length="9"),
        "length must be an integer from 1",
    ),
    "traced": (
        lambda: jax.jit(lambda x: visualize.heads(x) and x)(scores()),
        "scores are traced: .*Return them from the jitted function",
    ),
    "a mask of another shape": (
        lambda: visualize.masks({"own": mj.Dense(np.ones((5, 5), bool))}, mj.Tokens(3)),
        r"rules\['own'\] does not fit 3 queries and 3 keys",
    ),
    "tokens of another shape": (
        lambda: visualize.masks({"own": mj.Causal()}, mj.Tokens(3, pos=np.arange(4)[None])),
        r"does not fit.*Arrays of tokens are \[B, length\]",
    ),
    "no tokens": (lambda: visualize.masks({"own": mj.Causal()}, mj.Tokens(0)), "no pair to draw"),
    "a number of tokens": (
        lambda: visualize.masks({"own": mj.Causal()}, 5),  # type: ignore[arg-type]
        "queries must be of class Tokens: got int",
    ),
    "no figures": (lambda: visualize.curves({}), "series holds no figures to draw"),
    "no mask": (lambda: visualize.masks({}, mj.Tokens(3)), "there is no mask to draw"),
    "too much for a page": (
        lambda: visualize.html(np.ones((3, 1000, 1000))),
        "3,000,000 weights are too many for a page.*pass fewer heads or rows",
    ),
}


@pytest.mark.parametrize("value", [5, None, b"x"], ids=repr)
def test_titles_and_names_that_are_no_text(value):
    labels = {"queries": "abcd", "keys": "vwxyz"}
    drawn = [
        lambda: visualize.alignment(scores(), **labels, title=value),
        lambda: visualize.alignment(scores(), **labels, query_name=value),
        lambda: visualize.heads(scores(), title=value),
        lambda: visualize.by_query(scores()[0], name=value),
        lambda: visualize.by_query(scores()[0], title=value),
        lambda: visualize.entropy([scores()], names=[value]),
        lambda: visualize.layers([scores()], names=[value]),
        lambda: visualize.top_keys(scores(), np.zeros((3, 4, 5), int), title=value),
        lambda: visualize.curves({value: ([1], [2])}),
        lambda: visualize.masks({value: mj.Causal()}, mj.Tokens(3)),
    ]
    for draw in drawn:
        with pytest.raises(ShapeError, match="must be a text: got"):
            draw()


@pytest.mark.parametrize("name", ["\ud83d", "cost $\\frac$", "$", "", " ", "a\nb"])
def test_any_text_is_a_name(tmp_path, name):
    path = tmp_path / "picture.png"
    drawn = [
        lambda: visualize.curves({name: ([1], [2])}, path),
        lambda: visualize.masks({name: mj.Causal()}, mj.Tokens(3), None, path),
        lambda: visualize.heads(scores(), path, title=name, query_name=name, key_name=name),
        lambda: visualize.layers([scores()], path, names=[name]),
        lambda: visualize.entropy([scores()], path, names=[name]),
        lambda: visualize.html(scores(), path, query_name=name, key_name=name),
    ]
    for draw in drawn:
        draw()
        assert path.stat().st_size
        path.unlink()


def test_half_a_character_is_drawn_as_one_that_is_not_known(tmp_path):
    labels = ["\ud83d", "b", "c", "d"]  # what a tokenizer of bytes may cut
    visualize.html(scores(), tmp_path / "page.html", queries=labels)
    assert ">?<" in (tmp_path / "page.html").read_text(encoding="utf-8")
    visualize.heads(scores(), tmp_path / "heads.png", queries=labels)
    assert (tmp_path / "heads.png").stat().st_size


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_drawn_is_refused(name):
    draw, message = BAD[name]
    with pytest.raises(ShapeError, match=message):
        draw()


@pytest.mark.parametrize("draw", [visualize.alignment, visualize.heads, visualize.html])
@pytest.mark.parametrize(("queries", "keys"), [("abc", "vwxyz"), ("abcd", "vwxy")])
def test_labels_must_match(tmp_path, draw, queries, keys):
    with pytest.raises(ShapeError, match=r"Expected scores \[N, T, S\] with a label for every"):
        draw(scores(), tmp_path / "map.png", queries=queries, keys=keys)
    assert not (tmp_path / "map.png").exists()


def test_importing_the_module_loads_no_matplotlib():
    code = "import sys, mha_jax.visualize; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_page_loads_no_matplotlib():
    code = (
        "import sys, numpy, mha_jax.visualize as v; v.html(numpy.ones((1, 2, 2)));"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
