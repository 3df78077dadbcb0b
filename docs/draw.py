"""Draw the pictures of the guide's page How it works: `python docs/draw.py` writes docs/images/*.svg.

What a tile is comes from the library's own answer, `backends.visits`, and its pairs from the mask itself.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import mha_jax as mj
from mha_jax.attention.check import check
from mha_jax.backends import visits

INK, QUIET, FILL, LIGHT = "#1f2933", "#52606d", "#2f6fb2", "#cfe2f3"
FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"


def text(x, y, words, size=13, color=INK, anchor="start", weight="normal"):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f"<text x='{x}' y='{y}' font-size='{size}' fill='{color}' text-anchor='{anchor}' "
        f"font-weight='{weight}' {FONT}>{words}</text>"
    )


def box(x, y, width, height, fill="white", edge=INK, radius=0):
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='{radius}' fill='{fill}' "
        f"stroke='{edge}'/>"
    )


def arrow(x, y, to):
    return (
        f"<path d='M{x} {y} V{to - 6}' stroke='{QUIET}'/>"
        f"<path d='M{x - 4} {to - 7} L{x} {to} L{x + 4} {to - 7} Z' fill='{QUIET}'/>"
    )


def picture(width, height, title, shapes):
    """Return an SVG on white, so that it can be read on dark pages, too."""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img'>"
        f"<title>{title}</title>"
        f"<rect width='{width}' height='{height}' rx='8' fill='white'/>{''.join(shapes)}</svg>\n"
    )


def the_way_of_a_call():
    steps = [
        (
            "MultiHeadAttention · multi_head_attention",
            "layer/",
            "three doors, one set of arguments",
        ),
        ("attend_layer", "layer/functional.py", "fold, project, attend, combine, unfold"),
        ("Call → check → Problem", "attention/", "a wrong call ends here, in one sentence"),
        ("derivative", "engine/derivative.py", "one rule for derivatives of every order"),
        (
            "attention_pass",
            "engine/attention_pass.py",
            "one primitive; lowered, it learns platform and mesh",
        ),
    ]
    left, wide, high, step = 16, 390, 34, 54
    shapes = []
    for i, (name, file, what) in enumerate(steps):
        y = 16 + i * step
        shapes += [
            box(left, y, wide, high, LIGHT if i == len(steps) - 1 else "white", FILL, 6),
            text(left + wide / 2, y + 22, name, 13, anchor="middle", weight="bold"),
            text(left + wide + 16, y + 15, what),
            text(left + wide + 16, y + 31, file, 11, QUIET),
            arrow(left + wide / 2, y + high, y + step),
        ]
    y = 16 + len(steps) * step
    names = "reference", "blockwise", "pallas_tpu", "cudnn", "mosaic_gpu"
    places = "any, small", "any", "TPU", "GPU", "GPU"
    each = (wide - 4 * 6) / 5
    for i, (name, place) in enumerate(zip(names, places)):
        x = left + i * (each + 6)
        shapes += [
            box(x, y, each, 40, "white", FILL, 6),
            text(x + each / 2, y + 17, name, 10, anchor="middle", weight="bold"),
            text(x + each / 2, y + 32, place, 10, QUIET, "middle"),
        ]
    shapes += [
        text(left + wide + 16, y + 17, "the output, and every row's m and l"),
        text(left + wide + 16, y + 33, "backends/", 11, QUIET),
    ]
    return picture(770, y + 56, "The way of a call", shapes)


def tiles():
    tokens, size, pixel = 16, 4, 9
    packed = mj.Tokens(tokens, segment=jnp.array([[0] * 6 + [1] * 10]))
    padded = mj.Tokens(tokens, valid=jnp.arange(tokens)[None] < 10)
    plain = mj.Tokens(tokens)
    panels = [
        ("Causal()", mj.Causal(), plain),
        ("Causal() & Window(5, 0)", mj.Causal() & mj.Window(5, 0), plain),
        ("SameSegment()", mj.SameSegment(), packed),
        ("ValidKeys()", mj.ValidKeys(), padded),
    ]
    fills = {visits.FULL: FILL, visits.PARTIAL: LIGHT, visits.EMPTY: "white"}
    side, shapes = tokens * pixel, []
    q = jnp.zeros((1, tokens, 1, 1))
    for i, (name, mask, facts) in enumerate(panels):
        x, y = 34 + i * (side + 40), 44
        call = mj.Call(q, q, q, mask=mask, q_tokens=facts, k_tokens=facts)
        kinds = np.asarray(visits.kinds(check(call), size, size))[0, 0]
        seen = np.broadcast_to(np.asarray(mask.matrix(facts, facts)), (1, 1, tokens, tokens))[0, 0]
        shapes.append(text(x + side / 2, 22, name, 12, anchor="middle", weight="bold"))
        for (r, c), kind in np.ndenumerate(kinds):
            at = x + c * size * pixel, y + r * size * pixel
            shapes.append(box(*at, size * pixel, size * pixel, fills[int(kind)], QUIET))
        for r, c in np.argwhere(seen):
            if kinds[r // size, c // size] == visits.PARTIAL:
                dot = x + (c + 0.5) * pixel, y + (r + 0.5) * pixel
                shapes.append(f"<circle cx='{dot[0]}' cy='{dot[1]}' r='2.4' fill='{FILL}'/>")
        shapes.append(text(x, y - 6, "keys →", 10, QUIET))
    shapes.append(
        f"<g transform='translate(24 {44 + side}) rotate(-90)'>{text(0, 0, '← queries', 10, QUIET)}</g>"
    )
    legend = [
        (FILL, "full: no mask is evaluated"),
        (LIGHT, "partial: it is evaluated; dots are seen"),
        ("white", "empty: never computed"),
    ]
    x, y = 34, 44 + side + 18
    for fill, words in legend:
        shapes += [box(x, y, 12, 12, fill, QUIET), text(x + 18, y + 11, words, 12)]
        x += 46 + 6.2 * len(words)
    return picture(770, y + 28, "Tiles of four masks", shapes)


if __name__ == "__main__":
    images = Path(__file__).parent / "images"
    for name, drawn in {"call": the_way_of_a_call(), "tiles": tiles()}.items():
        (images / f"{name}.svg").write_text(drawn, encoding="utf-8")
