"""Two checkouts side by side: each in a process of its own, in the same race. No time is judged."""

import pytest

from benchmarks import __main__ as program
from benchmarks import report
from benchmarks.checkouts import HERE, Checkout
from benchmarks.peers.checkout import CheckoutPeer
from benchmarks.results import BEFORE, OURS, Result
from benchmarks.rows import ROWS


@pytest.fixture
def checkout(tmp_path):
    """A folder with a package `mha_jax` that is not ours, and its process."""
    (tmp_path / "mha_jax").mkdir()
    (tmp_path / "mha_jax" / "__init__.py").write_text("print('noise'); VERSION = 'of old'")
    one = Checkout(tmp_path, "checkouts:Package")
    yield one
    one.close()


def test_the_package_is_the_checkouts(checkout):
    assert checkout.call("attribute", "VERSION") == "of old"


def test_an_error_comes_back_and_the_process_goes_on(checkout):
    with pytest.raises(RuntimeError, match=r"AttributeError: .*has no attribute 'AGE'"):
        checkout.call("attribute", "AGE")
    assert checkout.call("attribute", "VERSION") == "of old"


def test_a_process_that_ended_is_named(checkout):
    checkout.process.kill()
    checkout.process.wait()
    with pytest.raises(RuntimeError, match=f"the process of {checkout.path} ended with -9"):
        checkout.call("attribute", "VERSION")


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no package mha_jax\. Give the root of a checkout"):
        Checkout(tmp_path, "checkouts:Package")


def test_this_checkout_beside_itself(capsys):
    results = program.main(
        ["--quick", "--repeats", "2", "--rows", "decode", "--baseline", str(HERE)]
    )
    assert [(r.peer, r.status) for r in results] == [(OURS, "measured"), (BEFORE, "measured")]
    assert results[1].difference == 0
    assert results[0].temporary_bytes == results[1].temporary_bytes
    assert [len(r.cpu_times) for r in results] == [2, 2]
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert (last[0], last[-1]) == ("decode", "1.000")


def test_a_checkout_runs_every_row_that_ours_runs():
    peer = CheckoutPeer(OURS, None)  # type: ignore[arg-type]
    assert [row.name for row in ROWS.values() if peer.cannot(row)] == []


def test_the_comparison_is_ours_over_the_baselines():
    common = {"trace_times": (1.0,), "compile_times": (1.0,)}
    results = [
        Result(
            "tiny", OURS, "ours", "measured", "", (1.0, 3.0), (2.0,), temporary_bytes=10, **common
        ),
        Result(
            "tiny", BEFORE, "ours", "measured", "", (4.0, 4.0), (8.0,), temporary_bytes=8, **common
        ),
    ]
    line = report.comparison([ROWS["tiny"]], results).splitlines()[1].split()
    assert line[5:9] == ["0.500", "0.250", "0.250", "1.000"]
    assert line[-1] == "1.250"
