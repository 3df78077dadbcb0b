"""mha_jax as a checkout has it, in a process of its own."""

from benchmarks.checkouts import Checkout
from benchmarks.peers.base import Peer
from benchmarks.rows import Data, Row
from benchmarks.runs import CheckoutRun, Run


class CheckoutPeer(Peer):
    """Ours, of one checkout: with another beside it, both stand in processes of the same kind."""

    framework = "ours"
    packages = ("mha_jax",)

    def __init__(self, name: str, checkout: Checkout):
        self.name, self.checkout = name, checkout

    def run(self, row: Row, data: Data) -> Run:
        return CheckoutRun(self.checkout, row)
