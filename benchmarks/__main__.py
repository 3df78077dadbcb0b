"""Measure mha_jax side by side with every installed peer.

python -m benchmarks                        the rows of the README's table
python -m benchmarks --all                  every feature as well
python -m benchmarks --rows tiny decode --peers linen "torch sdpa"
python -m benchmarks --json FILE --plot FILE.png --markdown
python -m benchmarks --baseline ../before   ours beside ours of another checkout, in turns
python -m benchmarks --list                 the rows and what they are
python -m benchmarks tpu                    our TPU kernels by the compiler's schedule
python -m benchmarks gpu                    our programs for NVIDIA GPUs by what XLA made of them
python -m benchmarks decoding               decoding with a cache beside decoding without
python -m benchmarks caches                 a step of decoding by what its cache holds
python -m benchmarks scale                  one example over up to 1,024 chips, by the compiler
"""

import argparse
import importlib
import pathlib
import sys
from typing import Any

from benchmarks import machine, plot, report
from benchmarks.checkouts import HERE, Checkout
from benchmarks.measure import Settings, measure, progress
from benchmarks.peers import NAMES, load
from benchmarks.peers.checkout import CheckoutPeer
from benchmarks.results import BEFORE, OURS, Result
from benchmarks.rows import PUBLISHED, ROWS, Row


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="which rows, instead")
    parser.add_argument("--all", action="store_true", help="all rows")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--baseline", metavar="CHECKOUT", help="compare with another checkout")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing (5)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a peer on a row (60)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a test of the program")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    return parser


def chosen(options: argparse.Namespace) -> list[Row]:
    """Return the rows that the command line asks for."""
    names = list(options.rows or (ROWS if options.all else PUBLISHED))
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        sys.exit(f"error: no row {', '.join(unknown)}. --list names them all.")
    rows = [ROWS[name] for name in names]
    return [row.shrunk() for row in rows] if options.quick else rows


def take_part(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Return the peers that are here and those that are not; ours always takes part."""
    wanted = NAMES if options.peers is None else (OURS, *options.peers)
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        sys.exit(f"error: no peer {', '.join(unknown)}. They are: {', '.join(NAMES)}.")
    return load(tuple(wanted))


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run the command line; return what was measured."""
    options = parser().parse_args(arguments)
    if options.list:
        print("\n".join(f"{row.name:34s} {row.title}" for row in ROWS.values()))
        return []
    rows = chosen(options)
    if options.baseline and options.peers is None:
        options.peers = []
    peers, absent = take_part(options)
    checkouts = open_checkouts(options.baseline, peers)
    use_all_cores()
    known = machine.facts()
    print(machine.sentence(known), flush=True)
    settings = Settings(options.repeats, options.limit, 0.0 if options.quick else 0.05)
    results: list[Result] = []
    for row in rows:
        results += measure(row, peers, absent, settings, progress)
        progress("")
        print("\n" + report.row_table(row, results), flush=True)
    if options.baseline:
        print(f"\nbefore: commit {machine.commit(options.baseline)}")
        print(report.comparison(rows, results))
    for checkout in checkouts:
        checkout.close()
    if options.json:
        pathlib.Path(options.json).write_text(report.to_json(rows, results, known))
    if options.plot:
        plot.draw(rows, results, options.plot, machine.sentence(known))
    if options.markdown:
        print("\n" + report.markdown(rows, results, known))
    return results


def open_checkouts(baseline: str | None, peers: list[Any]) -> list[Checkout]:
    """Put this checkout and the baseline, where one is asked for, in the place of our own peer."""
    if baseline is None:
        return []
    checkouts = [Checkout(path, "peers.checkout:Served") for path in (HERE, baseline)]
    peers[:1] = [CheckoutPeer(name, one) for name, one in zip((OURS, BEFORE), checkouts)]
    return checkouts


def use_all_cores() -> None:
    """Let torch, where it is loaded, use as many threads as there are cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(machine.cores())


def dispatch(arguments: list[str]) -> None:
    """Run the command, or the one of its own that the first argument names."""
    if arguments[:1] in (["tpu"], ["gpu"], ["decoding"], ["caches"], ["overhead"], ["scale"]):
        importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    else:
        main(arguments)


if __name__ == "__main__":
    dispatch(sys.argv[1:])
