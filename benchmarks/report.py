"""Results as text: a table on the terminal, a table in Markdown, JSON."""

import dataclasses
import json
from typing import Any

from benchmarks.machine import sentence
from benchmarks.results import BEFORE, OURS, Result, best, find, ratio
from benchmarks.rows import Row

SCHEMA = 2


def seconds(value: float | None) -> str:
    """Write a time in the unit that suits it.

    >>> seconds(0.0123), seconds(2.5), seconds(0.000045), seconds(None)
    ('12.3 ms', '2.50 s', '45.0 us', '-')
    """
    if value is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            break
    digits = 2 if value * factor < 10 else 1 if value * factor < 100 else 0
    return f"{value * factor:.{digits}f} {unit}"


def size(value: int | None) -> str:
    """Write a number of bytes in the unit that suits it.

    >>> size(0), size(1536), size(3 * 2**30), size(None)
    ('0 B', '1.5 KiB', '3.0 GiB', '-')
    """
    if value is None:
        return "-"
    if value < 1024:
        return f"{value} B"
    power = 3 if value >= 2**30 else 2 if value >= 2**20 else 1
    return f"{value / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def times(value: float | None) -> str:
    """Write a ratio.

    >>> times(4.267), times(0.5), times(31.4), times(None)
    ('4.27x', '0.50x', '31.4x', '-')
    """
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]

    def write(line):
        cells = [x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join([write(heads), *(write(line) for line in lines)])


def row_table(row: Row, results: list[Result]) -> str:
    """Return what was measured of one row, and below it who was not and why."""
    heads = ["peer", "a call", "lowest", "highest", "theirs/ours", "CPU", "theirs/ours"]
    heads += ["temporaries", "trace+compile", "first call"]
    mine = [r for r in results if r.row == row.name]
    lines = [
        [
            r.peer,
            *map(seconds, (r.median, min(r.times), max(r.times))),
            times(ratio(results, row.name, r.peer)),
            seconds(r.cpu_median),
            times(ratio(results, row.name, r.peer, "cpu_median")),
            size(r.temporary_bytes),
            *map(seconds, (r.compile_median, r.first_call)),
        ]
        for r in mine
        if r.status == "measured"
    ]
    text = [f"{row.name}: {row.title}", indent(table(heads, lines))]
    text += [f"  {r.peer}: {r.status}, {r.reason}" for r in mine if r.reason]
    return "\n".join(text)


def comparison(rows: list[Row], results: list[Result]) -> str:
    """Return ours over the baseline's of every row: below 1, the change was for the better."""
    heads = ["row", OURS, BEFORE, f"{OURS}/{BEFORE}", "of lowest", "of CPU", "trace+compile"]
    heads += ["temporaries", BEFORE, f"{OURS}/{BEFORE}"]
    figures = ("median", "lowest", "cpu_median", "compile_median")
    lines = []
    for row in rows:
        pair = find(results, row.name, OURS), find(results, row.name, BEFORE)
        bytes_ = [None if r is None else r.temporary_bytes for r in pair]
        share = bytes_[0] / bytes_[1] if bytes_[0] is not None and bytes_[1] else None
        over = (ratio(results, row.name, OURS, figure, BEFORE) for figure in figures)
        lines.append(
            [
                row.name,
                *(seconds(r and r.median) for r in pair),
                *(f"{x:.3f}" if x is not None else "-" for x in over),
                *map(size, bytes_),
                f"{share:.3f}" if share is not None else "-",
            ]
        )
    return table(heads, lines)


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def markdown(rows: list[Row], results: list[Result], known: dict[str, Any]) -> str:
    """Return the README's table: our time, then each peer's time over ours."""
    peers = list(dict.fromkeys(r.peer for r in results if r.peer != OURS))
    seen = [p for p in peers if any(r.peer == p and r.median is not None for r in results)]
    shown = [row for row in rows if not row.alone]
    heads = ["work", OURS, "temporaries", "best JAX peer", *seen]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in shown:
        ours = find(results, row.name, OURS)
        rival = best(results, row.name, "jax")
        cells = [
            row.title,
            "-" if ours is None else seconds(ours.median),
            "-" if ours is None else size(ours.temporary_bytes),
            "-" if rival is None else f"{rival.peer}, {size(rival.temporary_bytes)}",
            *(_cell(results, row.name, peer) for peer in seen),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"Not here: {name} ({reason})." for name, reason in _absent(results).items()]
    left_out = [
        f"`{r.row}`, {r.peer}: {r.reason}."
        for r in results
        if r.reason and r.status in ("skipped", "failed", "measured")
    ]
    parts = [
        "Ratios are a peer's median time over ours: above 1 we are faster, below 1 (bold) slower. "
        "A dash: the peer has no such feature, or was left out for the reason below. Temporaries "
        "are those of the compiled program.",
        "\n".join(lines),
        *(["\n".join(f"- {note}" for note in notes + left_out)] if notes + left_out else []),
        f"Measured by `python -m benchmarks`: {sentence(known)}.",
    ]
    return "\n\n".join(parts)


def _cell(results: list[Result], row: str, peer: str) -> str:
    value = ratio(results, row, peer)
    return f"**{times(value)}**" if value is not None and value < 1 else times(value)


def _absent(results: list[Result]) -> dict[str, str]:
    return {r.peer: r.reason for r in results if r.status == "absent"}


def to_json(rows: list[Row], results: list[Result], known: dict[str, Any]) -> str:
    """Return everything as JSON, one object."""
    whole = {
        "schema": SCHEMA,
        **known,
        "rows": [dataclasses.asdict(row) | {"title": row.title} for row in rows],
        "results": [result.to_json() for result in results],
    }
    return json.dumps(whole, indent=1)
