"""Who may import whom, one line a module; and how long a file may be."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "mha_jax"

# What each module of the core may import of ours, at any place in the file; `backends/*` is every file
# of a backend that has no line of its own. Reading order: a line names only modules above it.
MAY_IMPORT = {
    "types": "",
    "errors": "",
    "linear": "types errors",
    "tokens": "types errors",
    "masks": "tokens types errors",
    "cache": "masks tokens types errors",
    "dropout": "types errors",
    "softmax": "types errors",
    "keras_objects": "types errors",
    "initializers": "keras_objects types errors",
    "regularizers": "keras_objects types errors",
    "constraints": "keras_objects types errors",
    "projections": "initializers types errors",
    "backends": "",
    "backends.base": "masks dropout softmax tokens types errors",
    "backends.*": "backends.base masks dropout softmax tokens types errors",
    "checks": "backends.base masks dropout tokens types errors",
    "axes": "checks types errors",
    "lowering": "types errors",
    "differentiation": "linear backends.base types errors",
    "partitioning": "lowering types errors",
    "sharding": "partitioning backends.base types errors",
    "dispatch": "sharding differentiation lowering backends.base types errors",
    "attention_fn": "backends.base masks dropout types errors",
    "attention": (
        "attention_fn dispatch checks backends.base softmax masks dropout tokens types errors"
    ),
    "summaries": "attention backends.base types errors",
    "functional": (
        "attention axes projections checks backends.base cache masks dropout tokens types errors"
    ),
    "config": "initializers regularizers constraints types errors",
    "layer": (
        "functional config projections initializers regularizers constraints cache masks dropout"
        " tokens types errors"
    ),
}
# What a file of a backend may import beside the above: its own parts, and what is plain definition.
BACKENDS = {
    "backends.reference": "",
    "backends.tiles": "",
    "backends.few_rows": "",
    "backends.blockwise": "backends.tiles backends.few_rows",
    "backends.pallas_tpu_order": "",
    "backends.pallas_tpu_plan": "backends.pallas_tpu_order",
    "backends.pallas_tpu_view": "backends.pallas_tpu_order backends.pallas_tpu_plan",
    "backends.pallas_tpu_kernels": "backends.pallas_tpu_order backends.pallas_tpu_view",
    "backends.pallas_tpu": (
        "backends.pallas_tpu_order backends.pallas_tpu_plan backends.pallas_tpu_view"
        " backends.pallas_tpu_kernels"
    ),
}
# Where one module of the core needs a backend by its name: the tiled derivatives that one inherits.
NAMED = {"differentiation": "backends.blockwise"}
OUTSIDE = {"jax", "flax", "numpy", "optax", "jaxtyping", "typing_extensions"}


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ABOVE = ("models", "train", "bench", "interop", "visualize", "predict", "nnx")
CORE = [name for name in FILES if name and name.split(".")[0] not in ABOVE]


def imports(path, package="mha_jax"):
    """Return (modules of ours, packages of others) that a file imports, at any depth of the file."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != package:
                others.add(parts[0])
                continue
            inside = ".".join(parts[1:])
            while inside and inside not in FILES:
                inside = inside.rpartition(".")[0]
            ours.add(inside)
    return ours, others


def allowed(name):
    if name.startswith("backends."):
        own = BACKENDS.get(name, "")
        return set(f"{MAY_IMPORT.get(name, MAY_IMPORT['backends.*'])} {own}".split())
    return set(f"{MAY_IMPORT[name]} {NAMED.get(name, '')}".split())


def test_every_module_of_the_core_has_its_line():
    known = {*MAY_IMPORT, *BACKENDS}
    assert set(CORE) <= known, f"no line for {sorted(set(CORE) - known)}"


@pytest.mark.parametrize("name", CORE)
def test_a_module_imports_only_what_its_line_says(name):
    ours, others = imports(FILES[name])
    assert ours <= allowed(name), f"{name} imports {sorted(ours - allowed(name))}"
    foreign = {x for x in others if x not in OUTSIDE and x not in sys.stdlib_module_names}
    assert not foreign, f"{name} imports {sorted(foreign)}"


def test_lines_point_only_upwards():
    seen = set()
    for name, line in MAY_IMPORT.items():
        assert set(line.split()) <= seen, f"{name} may import {sorted(set(line.split()) - seen)}"
        seen.add(name)


def test_nothing_above_the_core_is_imported_by_it():
    for name in CORE:
        ours, _ = imports(FILES[name])
        above = {x for x in ours if x.split(".")[0] in ABOVE}
        assert not above, f"{name} imports {above}"


def test_interop_is_imported_by_nobody_but_itself():
    for name, path in FILES.items():
        if name and not name.startswith("interop"):
            ours, _ = imports(path)
            assert not any(x.startswith("interop") for x in ours), f"{name} imports interop"


def test_no_module_of_the_core_imports_keras_torch_or_matplotlib():
    for name in ["", *CORE]:
        _, others = imports(FILES[name])
        assert not others & {"keras", "torch", "matplotlib", "tensorflow", "tokamax"}, name


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("backends.")])
def test_a_file_is_short(name):
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= 400, f"{name or '__init__'} has {lines} lines"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("backends.")])
def test_a_kernel_is_short_enough(name):
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= 700, f"{name} has {lines} lines"


def test_the_median_file_is_small():
    lengths = sorted(len(FILES[name].read_text().splitlines()) for name in CORE)
    assert lengths[len(lengths) // 2] <= 200


def test_the_public_names_are_all_there_and_nothing_else():
    import mha_jax

    tree = ast.parse(FILES[""].read_text())
    named = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert named == set(mha_jax.__all__)
    assert all(hasattr(mha_jax, name) for name in mha_jax.__all__)


@pytest.mark.parametrize("name", CORE)
def test_no_blind_except_and_no_assert(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        assert not isinstance(node, ast.Assert), f"{name}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), (
                f"{name}:{node.lineno}"
            )
