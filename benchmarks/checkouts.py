"""A checkout of mha_jax in a process of its own, with these benchmarks and its package."""

import contextlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

# What is raised where something asked for turns out not to be there.
REPORTED = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
HERE = pathlib.Path(__file__).resolve().parent.parent
# The package comes from the checkout, `benchmarks` from here, whatever the checkout holds.
_START = (
    "import os, sys; answers = os.dup(1); os.dup2(2, 1); "
    "sys.path[0] = {checkout!r}; import mha_jax; sys.path[0] = {here!r}; "
    "from benchmarks.checkouts import serve; serve({target!r}, answers)"
)


class Checkout:
    """An object of a class of these benchmarks, in a process that imports a checkout's mha_jax.

    Its methods take and return what JSON holds. What they print goes to stderr. The process sleeps
    between two calls.

    Args:
      path: A folder that holds the package `mha_jax`.
      target: "module:Class" below `benchmarks`; the class is called without arguments.
    """

    def __init__(self, path: str | os.PathLike, target: str):
        self.path = pathlib.Path(path).resolve()
        if not (self.path / "mha_jax" / "__init__.py").is_file():
            raise SystemExit(
                f"error: {path} holds no package mha_jax. Give the root of a checkout, such as "
                "git worktree add ../before COMMIT makes."
            )
        code = _START.format(checkout=str(self.path), here=str(HERE), target=target)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object and wait for what it returns.

        Raises:
          RuntimeError: The method raised, with its message; or the process has ended.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of {self.path} ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # what a process that ended has not read
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(target: str, descriptor: int) -> None:
    """Answer the calls that come in on stdin, one a line, until it is closed."""
    answers = os.fdopen(descriptor, "w")
    module, name = target.split(":")
    served = getattr(importlib.import_module(f"benchmarks.{module}"), name)()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(served, method)(*arguments)}
        except REPORTED as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class Package:
    """What a process says of the package that it has imported."""

    def attribute(self, name: str) -> Any:
        """Return an attribute of mha_jax."""
        return getattr(importlib.import_module("mha_jax"), name)
