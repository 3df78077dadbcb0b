"""mha_jax as a checkout has it, in a process of its own."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import numpy as np

from benchmarks.checkouts import Checkout
from benchmarks.peers.base import Peer
from benchmarks.peers.ours import Ours
from benchmarks.rows import Data, Row, draw
from benchmarks.runs import Costs, Numbers, Run
from benchmarks.timer import Sample


class CheckoutPeer(Peer):
    """Ours, of one checkout: with another beside it, both stand in processes of the same kind."""

    framework = "ours"
    packages = ("mha_jax",)
    has = Ours.has

    def __init__(self, name: str, checkout: Checkout):
        self.name, self.checkout = name, checkout

    def run(self, row: Row, data: Data) -> Run:
        return CheckoutRun(self.checkout, row)


class Served:
    """Our own runs, one after the other, in the process of a checkout (`CheckoutRun`)."""

    run: Run

    def prepare(self, row: dict[str, Any]) -> None:
        asked = Row(**row)
        self.run = Ours().run(asked, draw(asked))

    def compile(self) -> Costs | None:
        return self.run.compile()

    def first(self, compare: bool, path: str) -> float:
        taken, numbers = self.run.first(compare)
        if numbers is not None:
            np.savez(path, **numbers)  # type: ignore[arg-type]
        return taken

    def sample(self, calls: int) -> Sample:
        return self.run.sample(calls)


class CheckoutRun(Run):
    """Our own run of a row as a checkout has it, in its process."""

    def __init__(self, checkout: Checkout, row: Row):
        self.checkout = checkout
        checkout.call("prepare", dataclasses.asdict(row))

    def compile(self) -> Costs:
        return Costs(*self.checkout.call("compile"))

    def first(self, compare: bool) -> tuple[float, Numbers | None]:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "numbers.npz"
            taken = self.checkout.call("first", compare, str(path))
            return taken, dict(np.load(path)) if compare else None

    def sample(self, calls: int) -> Sample:
        return Sample(*self.checkout.call("sample", calls))
