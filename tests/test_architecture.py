"""Who may import whom, one line a module; and how long a file may be."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "mha_jax"

# The rules: a module imports from its own floor and from those below, where it is named by its longest
# line. Modules of one folder are on one floor unless they have lines of their own.
FLOORS = [
    ["types", "errors", "rooms", "cli", "files"],
    ["attention"],
    ["backends"],
    ["engine", "sharding"],
    ["attention.attention_fn", "attention.functions", "attention.scores"],
    ["layer"],
    ["layer.nnx", "interop", "models", "visualize"],
    ["train", "__main__"],
]
# The doors through which a floor reaches a higher one: a backend by its name, when it is first asked.
LAZY = {"backends.base": "backends.blockwise"}
# What several backends share.
SHARED = {"backends.base", "backends.visits", "backends.arithmetic", "backends.asked"}
OUTSIDE = {"jax", "flax", "numpy", "optax", "jaxtyping", "typing_extensions"}


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ABOVE = ("models", "train", "interop", "visualize")
CORE = [name for name in FILES if name and name.split(".")[0] not in ABOVE and name != "layer.nnx"]


def floor(name):
    """Return the number of the floor that a module stands on."""
    found = [
        (len(line), number)
        for number, lines in enumerate(FLOORS)
        for line in lines
        if f"{name}.".startswith(f"{line}.")
    ]
    return max(found)[1]


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


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_a_module_imports_only_from_its_floor_and_below(name):
    ours, _ = imports(FILES[name])
    higher = {x for x in ours if x and floor(x) > floor(name)} - {LAZY.get(name)}
    assert not higher, f"{name} imports {sorted(higher)}"


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_few_packages(name):
    _, others = imports(FILES[name])
    foreign = {x for x in others if x not in OUTSIDE and x not in sys.stdlib_module_names}
    assert not foreign, f"{name} imports {sorted(foreign)}"


def test_what_attention_is_knows_no_flax():
    for name in CORE:
        if name.startswith(("attention.", "backends.")) and name != "attention.attention_fn":
            assert "flax" not in imports(FILES[name])[1], name


def test_a_backend_imports_no_other():
    for name in FILES:
        if name.startswith("backends."):
            own = ".".join(name.split(".")[:2])
            ours = {x for x in imports(FILES[name])[0] if x.startswith("backends.")}
            ours -= {*SHARED, LAZY.get(name)}
            assert all(f"{x}.".startswith(f"{own}.") for x in ours), f"{name} imports {ours}"


def test_no_two_modules_import_each_other():
    graph = {
        name: imports(path)[0] - {name, LAZY.get(name)} for name, path in FILES.items() if name
    }
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name in done or name not in graph:
            return
        open_.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(open_.pop())

    for name in graph:
        visit(name)


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
