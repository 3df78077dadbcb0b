"""Biases by rule as arithmetic of pairs: what a kernel computes of them tile by tile, with what it reads.

A rule is traced and parted. What it makes of the tokens of one side, of heads and of its own numbers is
computed outside, and reaches a kernel as vectors do; what it makes of pairs is computed tile by tile where it
is arithmetic: `Alibi`, most rules of one's own.

N query heads   T query length   S key length
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from mha_jax.attention import biases
from mha_jax.attention.call import Problem
from mha_jax.attention.tokens import consecutive, near
from mha_jax.types import Array

# What tiles are computed by, operation by operation.
_ARITHMETIC = set(
    """abs add and convert_element_type cos div eq exp exp2 ge gt integer_pow le log lt max min mul ne neg
    not or rem rsqrt select_n sign sin sqrt square sub tanh xor""".split()  # noqa: SIM905
)
_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"}
_BOTH = {"q", "k"}
# Where a value comes from: tokens of queries or of keys, the floats of the rule.
_MOVES = "f"
# In place of a step: pairs whose axes are no longer those of logits.
_OTHER_AXES = -1


class Operand(NamedTuple):
    """What is read under a name, as numbers of a dtype; `moves` where they follow from the rule's floats."""

    name: str
    dtype: Any
    moves: bool = False


class Step(NamedTuple):
    """An operation on operands, numbers, and results of steps before, which are integers here."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Term:
    """What is added to the logits: the result of steps."""

    steps: tuple[Step, ...]
    result: Any

    def tile(self, shape: tuple[int, int], read: Callable[[str], Array]) -> Array:
        """Return it for the pairs of a tile; `read` returns an operand as one."""
        made: list[Array] = []

        def value(x: Any) -> Array:
            if isinstance(x, int):
                return made[x]
            if not isinstance(x, Operand):
                return jnp.full(shape, x.item(), x.dtype)
            found = read(x.name)
            return found != 0 if x.dtype == jnp.bool_ else found.astype(x.dtype)

        for step in self.steps:
            of = _OWN.get(step.primitive.name, step.primitive.bind)
            made.append(of(*map(value, step.inputs), **step.params))
        return value(self.result).astype(jnp.float32)

    @property
    def reads(self) -> dict[str, Operand]:
        """The operands by their names."""
        read = (self.result, *(x for step in self.steps for x in step.inputs))
        return {x.name: x for x in read if isinstance(x, Operand)}

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the operands that follow from the rule's floats."""
        return tuple(name for name, x in self.reads.items() if x.moves)


def _sign(x: Array) -> Array:
    one, zero = jnp.full(x.shape, 1, x.dtype), jnp.full(x.shape, 0, x.dtype)
    return lax.select(x > zero, one, lax.select(x < zero, -one, x * zero))


def _select(which: Array, *cases: Array) -> Array:
    if cases[0].dtype != jnp.bool_:
        return lax.select_n(which, *cases)
    other, chosen = cases
    return (which & chosen) | (~which & other)


# What compilers for TPUs do otherwise: they ask the device of this process, or, old ones, select no booleans.
_OWN = {"sign": _sign, "select_n": _select}


class Able(NamedTuple):
    """What kernels can do: the dtypes of pairs that they compute with, any if None, and reading T x S."""

    types: frozenset[Any] | None = None
    pairs: bool = True


ANYTHING = Able()


def why_not(
    problem: Problem, unlaid: Callable[[Problem, Any], str | None], able: Able = ANYTHING
) -> str | None:
    """Say why kernels cannot add a problem's bias by rule, or return None.

    Args:
      problem: The problem.
      unlaid: Says why they do not lay a rule along the diagonals, or returns None.
      able: What they can do.
    """
    for rule in rules(problem):
        where = unlaid(problem, rule)
        operation = where and parted(problem, rule, "", able)
        if isinstance(operation, str):
            return (
                "its kernels compute a bias by rule pair by pair where it is arithmetic, and "
                f"{type(rule).__name__} takes {operation}; along the diagonals it cannot be laid, as "
                f"{where}; tiles run it with backend=None"
            )
    return None


def unlaid(problem: Problem, rule: Any) -> str | None:
    """Say why a rule is not laid along the diagonals, or return None."""
    if not rule.only_distances:
        return "it knows more than distances"
    return None if consecutive(problem.q_tokens, problem.k_tokens) else "positions are data"


def rules(problem: Problem) -> list[Any]:
    """Return the rules whose sum is a problem's bias by rule."""
    return [] if problem.bias_rule is None else biases.apart(problem.bias_rule)[1]


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of a rule: known outside, its axes 1 where it only broadcasts, or made by a step."""

    sides: frozenset[str]
    known: Any = None
    step: int | None = None


class _NotArithmetic(Exception):
    """Pairs meet in an operation that tiles are not computed by: its name."""


def parted(
    problem: Problem, rule: Any, name: str, able: Able = ANYTHING
) -> tuple[Term, dict[str, Any]] | str:
    """Return a rule as a term and what it reads, [#B, #N, #T, #S], or the operation that is no arithmetic.

    Args:
      problem: The problem; where it is abstract, so is what is read.
      rule: One of its biases.
      name: What the names of operands begin with.
      able: What kernels can do.
    """
    problem = dataclasses.replace(problem, bias_rule=rule)
    if not any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(problem)):
        return _parted(problem, name, able)
    said: list[Any] = []

    def looked_at(problem: Problem) -> dict[str, Array]:
        found = _parted(problem, name, able)
        said.append(found if isinstance(found, str) else found[0])
        return {} if isinstance(found, str) else found[1]

    read = jax.eval_shape(looked_at, problem)
    return said[0] if isinstance(said[0], str) else (said[0], read)


def _parted(problem: Problem, name: str, able: Able) -> tuple[Term, dict[str, Any]] | str:
    rule: Any = problem.bias_rule
    q, k = biases.queries(problem.q_tokens, problem.q.shape[2]), problem.k_tokens.as_keys()
    given, tree = jax.tree.flatten((rule, q, k))
    sides = (
        *(_MOVES * jnp.issubdtype(jnp.result_type(a), jnp.floating) for a in jax.tree.leaves(rule)),
        *["" if a is q.head else "q" for a in jax.tree.leaves(q)],
        *["k"] * len(jax.tree.leaves(k)),
    )
    kinds = [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in given]

    # Of near tokens they are a plain difference: what else they may be costs ten operations a pair.
    plain = rule.only_distances and near(problem.q_tokens, problem.k_tokens)

    def logits(*leaves):
        rule, q, k = jax.tree.unflatten(tree, leaves)
        return rule.at(k.positions - q.positions, q.head) if plain else rule.logits(q, k)

    traced = jax.make_jaxpr(logits)(*kinds)
    inputs = [
        _Value(frozenset(side), jnp.asarray(a, x.dtype)) for a, x, side in zip(given, kinds, sides)
    ]
    walk = _Walk(name, able)
    try:
        (result,) = walk.run(traced.jaxpr, traced.consts, inputs)
        term = _needed(walk.steps, walk.input(result))
        return term, {name: walk.operands[name] for name in term.reads}
    except _NotArithmetic as error:
        return str(error)


def _needed(steps: list[Step], result: Any) -> Term:
    """Return the steps that a result follows from, numbered anew."""
    needed = {result} if isinstance(result, int) else set()
    for i in reversed(range(len(steps))):
        if i in needed:
            needed |= {x for x in steps[i].inputs if isinstance(x, int)}
    kept = [i for i in range(len(steps)) if i in needed]
    number = {old: new for new, old in enumerate(kept)}

    def renamed(x: Any) -> Any:
        return number[x] if isinstance(x, int) else x

    of = (steps[i]._replace(inputs=tuple(map(renamed, steps[i].inputs))) for i in kept)
    return Term(tuple(of), renamed(result))


class _Walk:
    """Goes through a rule's operations, computes what is known, and keeps those of pairs as steps."""

    def __init__(self, name: str, able: Able):
        self.name, self.able, self.steps, self.operands = name, able, [], {}
        self._values: list[Any] = []

    def run(self, jaxpr: Any, consts: Any, inputs: list[_Value]) -> list[_Value]:
        values = dict(zip(jaxpr.invars, inputs))
        values |= {v: _Value(frozenset(), c) for v, c in zip(jaxpr.constvars, consts)}

        def read(v):
            if isinstance(v, Literal):
                return _Value(frozenset(), np.asarray(v.val, cast(Any, v.aval).dtype))
            return values[v]

        for equation in jaxpr.eqns:
            found = self._made(equation, [read(v) for v in equation.invars])
            values |= dict(zip(equation.outvars, found))
        return [read(v) for v in jaxpr.outvars]

    def _made(self, equation: Any, given: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            return self.run(inner.jaxpr, inner.consts, given)
        sides = frozenset().union(*(x.sides for x in given))
        if name == "broadcast_in_dim":
            return [self._broadcast(equation, given[0])]
        if sides >= _BOTH:
            return [self._step(equation, given, sides)]
        known = [x.known for x in given]
        if name in _ARITHMETIC:
            known = jnp.broadcast_arrays(*known)
        else:
            known = [jnp.broadcast_to(x, v.aval.shape) for x, v in zip(known, equation.invars)]
        found = equation.primitive.bind(*known, **params)
        found = found if equation.primitive.multiple_results else [found]
        return [_Value(sides, x) for x in found]

    def _broadcast(self, equation: Any, x: _Value) -> _Value:
        """Broadcast nothing: axes of 1 are kept, and new ones are 1."""
        axes, shape = equation.params["broadcast_dimensions"], equation.params["shape"]
        if x.step is None:
            new = [1] * len(shape)
            for axis, size in zip(axes, jnp.shape(x.known)):
                new[axis] = size
            return dataclasses.replace(x, known=jnp.reshape(x.known, new))
        same = tuple(axes) == tuple(range(len(shape)))
        return x if same else dataclasses.replace(x, step=_OTHER_AXES)

    def _step(self, equation: Any, given: list[_Value], sides: frozenset[str]) -> _Value:
        name = equation.primitive.name
        # Whether a number is none is not asked by converting it: the compiler keeps its last bit.
        if name not in _ARITHMETIC or equation.params.get("new_dtype") == jnp.bool_:
            raise _NotArithmetic(repr(name))
        dtypes = {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
        if self.able.types is not None and (others := dtypes - self.able.types):
            raise _NotArithmetic(f"{name!r} of {min(map(str, others))}")
        inputs = tuple(map(self.input, given))
        self.steps.append(Step(equation.primitive, dict(equation.params), inputs))
        return _Value(sides, step=len(self.steps) - 1)

    def input(self, x: _Value) -> Any:
        """Return what a step reads: a step before, a number, or an operand, which is noted."""
        if x.step == _OTHER_AXES:
            raise _NotArithmetic("'broadcast_in_dim'")
        if x.step is not None:
            return x.step
        if isinstance(x.known, np.ndarray) and x.known.size == 1:
            return x.known
        same = [i for i, known in enumerate(self._values) if known is x.known]
        if not self.able.pairs and min(jnp.shape(x.known)[-2:], default=1) > 1:
            raise _NotArithmetic("an array of T x S")
        number = same[0] if same else len(self._values)
        name = f"{self.name}.{number}"
        if not same:
            array = jnp.asarray(x.known)
            self._values.append(x.known)
            self.operands[name] = array.reshape((1,) * (4 - array.ndim) + array.shape)
        dtype = jnp.asarray(x.known).dtype
        return Operand(name, dtype, _MOVES in x.sides and jnp.issubdtype(dtype, jnp.floating))
