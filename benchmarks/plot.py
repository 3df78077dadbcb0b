"""One picture: every peer's time and temporaries beside ours, a line of dots for each row."""

import pathlib
import textwrap

from benchmarks.report import seconds
from benchmarks.results import OURS, Result, find, ratio
from benchmarks.rows import Row

# Colours that a colour-blind reader can tell apart, and shapes for everybody.
STYLE = {
    OURS: ("#000000", "D"),
    "linen": ("#0072B2", "o"),
    "nnx": ("#56B4E9", "s"),
    "keras": ("#D55E00", "^"),
    "jax.nn": ("#009E73", "v"),
    "tokamax xla": ("#CC79A7", "P"),
    "tokamax xla_chunked": ("#AA4499", "X"),
    "haiku": ("#E69F00", "<"),
    "equinox": ("#999933", ">"),
    "torch sdpa": ("#882255", "*"),
    "torch mha": ("#CC6677", "h"),
    "products alone": ("#999999", "|"),
}


def draw(rows: list[Row], results: list[Result], path: str, caption: str) -> None:
    """Write the picture to a file; its ending says the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shown = [row for row in rows if not row.alone and find(results, row.name, OURS)]
    height = 1.9 + 0.42 * len(shown)
    figure, (time, memory) = pyplot.subplots(
        1, 2, figsize=(13, height), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    reached: list[float] = [0.8, 1.6]
    places = {row.name: len(shown) - 1 - i for i, row in enumerate(shown)}
    present = [name for name in STYLE if any(r.peer == name and r.times for r in results)]
    for name in present:
        colour, marker = STYLE[name]
        looks = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 7}
        looks |= {"zorder": 4 if name == OURS else 3, "alpha": 0.9}
        ratios = {row.name: ratio(results, row.name, name) for row in shown}
        points = [(value, places[row]) for row, value in ratios.items() if value is not None]
        reached += [value for value, _ in points]
        if points:
            time.plot(*zip(*points), label=name, **looks)
        found = [find(results, row.name, name) for row in shown]
        sizes = [
            (max(r.temporary_bytes, 1024) / 2**20, places[r.row])
            for r in found
            if r is not None and r.temporary_bytes is not None
        ]
        if sizes:
            memory.plot(*zip(*sizes), **looks)
    time.axvline(1, color="black", linewidth=1, zorder=2)
    lowest, highest = min(reached) / 1.2, max(reached) * 1.2
    time.axvspan(lowest, 1, color="#D55E00", alpha=0.07, zorder=0)
    time.set_title("time over ours (shaded: faster than us)", fontsize=10)
    memory.set_title("temporaries, MiB", fontsize=10)
    for axis, unit in ((time, "x"), (memory, "")):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _, unit=unit: f"{x:,.10g}{unit}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", color="0.9", zorder=0)
        axis.hlines(list(places.values()), 0, 1, transform=axis.get_yaxis_transform(), color="0.93")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    time.set_xlim(lowest, highest)
    time.set_ylim(-0.6, len(shown) - 0.4)
    time.set_xticks([t for t in (2.0**i for i in range(-6, 13)) if lowest <= t <= highest])
    labels = [f"{row.title}\n{seconds_of(results, row)}" for row in shown]
    time.set_yticks(list(places.values()), labels, fontsize=8)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    figure.supxlabel("\n".join(textwrap.wrap(caption, 190)), fontsize=7, color="0.4")
    figure.savefig(pathlib.Path(path), dpi=150)
    pyplot.close(figure)


def seconds_of(results: list[Result], row: Row) -> str:
    """Return our time on a row, in words."""
    ours = find(results, row.name, OURS)
    return f"ours {seconds(ours.median if ours else None)}"
