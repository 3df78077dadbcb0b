"""What the package shows: rooms without an import before, their names, types, and missing packages."""

import json
import pathlib
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import pytest

import mha_jax
from mha_jax import rooms
from mha_jax.cli import COMMANDS, command
from mha_jax.errors import DataError, MhaError, MissingPackageError

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = {
    "mha_jax": "biases constraints initializers interop models nnx regularizers rotary sharding train "
    "visualize",
    "mha_jax.interop": "flax keras torch",
    "mha_jax.models": "bert decoder decoder_config deepseek feed_forward gguf gpt latent layouts llama "
    "minilm rxnmapper sizes smiles smollm2 t5 torch_file transformer vit weights wordpiece",
    "mha_jax.train": "checkpoints cmudict command configs data decoding digits g2p layout lm loop losses "
    "modern optimizer predict processes progress scoring settings tasks translation workdir",
}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_room_is_there_without_an_import_and_listed():
    pytest.importorskip("orbax.checkpoint")
    names = [f"{package}.{name}" for package in ROOMS for name in ROOMS[package].split()]
    packages = list(ROOMS)
    code = f"""
import json, mha_jax
listed = {{name: dir(eval(name)) for name in {packages}}}
kinds = {{name: type(eval(name)).__name__ for name in {names}}}
print(json.dumps([listed, kinds]))
"""
    listed, kinds = json.loads(run(code))
    assert set(kinds.values()) == {"module"}
    for package in ROOMS:
        shown = set(listed[package]) - {*mha_jax.__all__, "__version__"}
        assert shown == set(ROOMS[package].split()), package
    assert set(mha_jax.__all__) < set(listed["mha_jax"])


def test_a_room_that_is_none_is_an_attribute_error():
    for package in (mha_jax, mha_jax.interop, mha_jax.models):
        with pytest.raises(
            AttributeError, match=rf"'{package.__name__}' has no attribute 'cellar'"
        ):
            _ = package.cellar


@pytest.mark.parametrize(
    "name, hint",
    [
        ("MultiheadAttention", r"\. Did you mean 'MultiHeadAttention'\?$"),
        ("Casual", r"\. Did you mean 'Causal'\?$"),
        ("Alibi", r"\. It is mha_jax\.biases\.Alibi$"),
        ("ALiBi", r"\. It is mha_jax\.biases\.Alibi$"),
        ("YaRN", r"\. It is mha_jax\.rotary\.YaRN$"),
        ("jnp", "$"),
        ("_Window", "$"),
    ],
)
def test_a_name_that_is_none_says_which_may_be_meant(name, hint):
    with pytest.raises(AttributeError, match=f"module 'mha_jax' has no attribute '{name}'.*{hint}"):
        getattr(mha_jax, name)


def test_what_shows_without_underscore_is_public_or_a_folder():
    folders = {p.stem for p in (ROOT / "mha_jax").iterdir() if not p.name.startswith("_")}
    code = "import mha_jax, json; print(json.dumps([n for n in vars(mha_jax) if n[0] != '_']))"
    assert set(json.loads(run(code))) <= {*mha_jax.__all__} | folders


def test_every_name_that_type_checkers_see_is_there():
    """The imports for type checkers, and the rooms that are imported when used, are the same."""
    for package in ROOMS:
        path = ROOT / package.replace(".", "/") / "__init__.py"
        for_checkers = path.read_text().partition("TYPE_CHECKING:")[2].partition("else:")[0]
        lines = [line.split() for line in for_checkers.splitlines() if line.strip()]
        assert all(words[3] == words[5] for words in lines)
        assert {words[3] for words in lines} == set(ROOMS[package].split()), package


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    message = r'h5py is not installed\. Install it with: pip install "mha_jax\[keras\]"'
    with pytest.raises(MissingPackageError, match=message), rooms.packages():
        import h5py  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), rooms.packages():
        import no_such_package  # noqa: F401
    assert issubclass(MissingPackageError, (MhaError, ImportError))


def test_every_extra_is_one():
    text = (ROOT / "pyproject.toml").read_text()
    for package, extra in rooms.EXTRAS.items():
        line = next(
            x for x in text.replace("\n    ", "").splitlines() if x.startswith(f"{extra} =")
        )
        assert package.replace("absl", "absl-py").partition("_")[0] in line, package


WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
"""


@pytest.mark.parametrize(
    ("missing", "code", "extra"),
    [
        (["ml_collections"], "from mha_jax.train.__main__ import main; main(['--list'])", "train"),
        (["grain"], "import mha_jax as mj; mj.train.g2p", "train"),
        (["matplotlib"], "import mha_jax as mj; mj.visualize.heads([[[1.0]]])", "visualize"),
    ],
)
def test_a_part_without_its_packages_says_what_to_install(missing, code, extra):
    code = WITHOUT.format(missing=missing) + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.endswith(
        f'the package {missing[0]} is not installed. Install it with: pip install "mha_jax[{extra}]"'
    )


def test_a_cache_and_a_call_print_on_a_line():
    cache = mha_jax.MultiHeadAttention(2, 8).empty_cache(batch=2, capacity=64)
    assert str(cache) == ("Cache(keys=float32[2,2,64,8], values=float32[2,2,64,8], count=[0, 0])")
    x = jnp.ones((1, 5, 2, 4))
    tokens = mha_jax.Tokens(5, valid=jnp.ones((1, 5), bool))
    call = mha_jax.Call(x, x, x, k_tokens=tokens, mask=mha_jax.Dense(jnp.ones((5, 5), bool)))
    assert str(call) == (
        "Call(q=float32[1,5,2,4], k=float32[1,5,2,4], v=float32[1,5,2,4], "
        "k_tokens=Tokens(length=5, valid=bool[1,5]), mask=Dense(array=bool[5,5]))"
    )
    shown = []
    jax.jit(lambda cache: shown.append(str(cache)))(cache)
    cache.count.delete()
    assert shown == ["Cache(keys=float32[2,2,64,8], values=float32[2,2,64,8], count=int32[2])"]
    assert str(cache) == shown[0]


def test_commands_are_listed():
    done = subprocess.run([sys.executable, "-m", "mha_jax"], capture_output=True, text=True)
    assert all(f"python -m {name} " in done.stdout for name in COMMANDS)
    assert mha_jax.__version__ in done.stdout


def test_a_command_ends_in_a_sentence(capsys):
    @command
    def fails(arguments):
        raise DataError(f"nothing in {arguments}.")

    with pytest.raises(SystemExit, match=r"^error: nothing in \['x'\]\.$"):
        fails(["x"])
    assert capsys.readouterr().err == ""


def test_the_wheel_carries_what_runs_without_a_clone(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    build = "from setuptools import build_meta; print(build_meta.build_wheel({!r}))"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "mha_jax"):
        (source / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-c", build.format(str(tmp_path))],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob(f"mha_jax-{mha_jax.__version__}-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "mha_jax/py.typed" in names
    assert {f"mha_jax/train/configs/{name}.py" for name in ("g2p", "lm", "digits")} <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "configs"))}
