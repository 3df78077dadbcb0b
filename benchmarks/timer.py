"""The clock: what a call takes, and who is timed when."""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """Seconds of one call: on the wall, of all CPUs of the process, of the CPU of this thread alone."""

    wall: float
    process: float
    thread: float


def clocks() -> Sample:
    """Read the three clocks."""
    return Sample(time.perf_counter(), time.process_time(), time.thread_time())


def sample(run: Callable[[int], Any], calls: int = 1) -> Sample:
    """Time `run(calls)`, which makes so many calls, garbage collection off; return the mean of a call.

    Where there are several calls, one goes before them that is not counted.
    """
    gc.collect()
    gc.disable()
    try:
        if calls > 1:
            run(1)
        begun = clocks()
        run(calls)
        done = clocks()
    finally:
        gc.enable()
    return Sample(*((b - a) / calls for a, b in zip(begun, done)))


def repeated(call: Callable[[], Any]) -> Callable[[int], None]:
    """Return what makes a call so many times.

    >>> repeated(lambda: print("called"))(2)
    called
    called
    """

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    return run


def turns(rounds: dict[str, int]) -> Iterator[tuple[int, str]]:
    """Yield whose turn it is, (round, name), until everyone has had as many rounds as are due.

    Every other round goes backwards, so that nobody always follows the same neighbour.

    >>> [name for _, name in turns({"a": 3, "b": 2})]
    ['a', 'b', 'b', 'a', 'a']
    """
    for turn in range(max(rounds.values(), default=0)):
        names = [name for name, due in rounds.items() if turn < due]
        for name in names if turn % 2 == 0 else reversed(names):
            yield turn, name
