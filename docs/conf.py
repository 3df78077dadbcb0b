"""Sphinx configuration of the API reference: `sphinx-build -W --keep-going -n docs build/docs`.

The pages come from the docstrings, which are Google style with the further sections `Cost` and
`Source`, and from the signatures as the source writes them: `Float[Array, "*B T N H"]`, not what
jaxtyping makes of it at run time.
"""

import ast
import importlib.metadata
import inspect
import re
import textwrap

from sphinx.pycode import ModuleAnalyzer

project = "mha_jax"
copyright = "the mha_jax authors"
release = version = importlib.metadata.version("mha_jax")
html_theme = "furo"
html_title = f"mha_jax {version}"
html_show_sourcelink = html_show_copyright = False

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
myst_heading_anchors = 3  # Links to headings, as GitHub has them.
default_role = "code"  # One backtick in a docstring is code.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_default_options = {"exclude-members": "partial"}
suppress_warnings = ["ref.python"]  # One name in the linen and the nnx module: both are meant.
maximum_signature_line_length = 88
python_display_short_literal_types = True
napoleon_numpy_docstring = False
napoleon_include_init_with_doc = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Cost", "Source"]
toc_object_entries_show_parents = "hide"

# What signatures name that has no page here: the standard library, jax, and our own aliases of types.
_FOREIGN = (
    "Any|Callable|Mapping|Sequence|NamedTuple|TypedDict|None|os|pathlib|collections|typing|abc"
    "|jax|jnp|np|numpy|nn|nnx|flax|optax|keras|torch|tokenizers|argparse"
    "|Array|ArrayLike|Flags|Bool|Float|Int|UInt32|Shaped|DType|Params|PRNGKey|Precision|Initializer"
    "|Queries|Keys|Values|Labels|Layout|Shape|Size|Caches|Tiling|LinenAttention"
    "|Words|FlaxArguments|attention_fn|jaxtyping|jaxlib"
)
nitpick_ignore_regex = [("py:.*", rf"({_FOREIGN})([.\[].*)?")]

_SECTION = re.compile(r"(Cost|Source): *(\S.*)")
_HEADING = re.compile(r"(Args|Returns|Raises|Cost|Source|Yields):")
_RETURNS = re.compile(r" *(Returns|Yields):")
_LETTERS = re.compile(r"[A-Za-z] \w.* {3,}[A-Za-z] \w")
# A line that shows nothing. Before "The rows: all of them" it keeps napoleon from reading a type there.
_NOTHING = "\\"
# Text in backticks, or a mark that reStructuredText would read as markup.
_MARKS = re.compile(r"``?[^`]+``?|\\|[*|](?=\S)|(?<=\w)_(?=\W|$)")


def write_sections(app, what, name, obj, options, lines):
    """Make a docstring what napoleon and reStructuredText take it for.

    `Cost: text` gets a line of its own; `[*B, T]` and `|x|` are no markup; a table of a module stays
    a table; letters and their meanings, `T queries   S keys`, stay apart.
    """
    written, inside, example, table = [], False, False, False
    for line in lines:
        match, last = _SECTION.fullmatch(line), written[-1] if written else ""
        inside = bool(match) or (inside and bool(line.strip()) and not _HEADING.match(line))
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        table = what == "module" and line[:4].isspace() and (table or not last)
        if example:
            inside = False
            written.append(line)
        elif match:
            written += ["", f"{match[1]}:", f"  {_MARKS.sub(_escape, match[2])}"]
        elif table:
            written += [line] if last[:4].isspace() else ["::", "", line]
        elif _LETTERS.match(line) or (last.startswith("| ") and line.strip()):
            written.append(f"| {' · '.join(re.split(' {3,}', line.strip()))}")
        elif _RETURNS.fullmatch(line):
            written += [line, line[: len(line) - len(line.lstrip())] + f"  {_NOTHING}"]
        else:
            written.append(("  " if inside else "") + _MARKS.sub(_escape, line))
    lines[:] = [_NOTHING, *written] if what in ("property", "attribute") else written


def _escape(match):
    """Keep code as it is, parted from a plural's s, and put a backslash before a mark."""
    if match[0][0] != "`":
        return f"\\{match[0]}"
    return match[0] + ("\\ " if match.string[match.end() :][:1].isalnum() else "")


def write_signature(app, what, name, obj, options, signature, returns):
    """Return the arguments and the result as the source writes them."""
    if what not in ("function", "method", "class"):
        return None
    try:
        node = _parse(inspect.unwrap(obj))
    except (OSError, TypeError):
        return None
    own = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    if what == "class" and any(item.name == "__init__" for item in own):
        what, node = "method", next(item for item in own if item.name == "__init__")
        node.returns = None
    if isinstance(node, ast.FunctionDef):
        if what == "method" and not any(_name(d) == "staticmethod" for d in node.decorator_list):
            node.args.args = node.args.args[1:]
        result = ast.unparse(node.returns).strip("'") if node.returns else None
        return f"({ast.unparse(node.args)})", result
    fields = [_field(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    return f"({', '.join(field for field in fields if field)})", None


def _parse(obj):
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]


def _field(item):
    """Return a field of a dataclass as an argument; None for what is no argument."""
    name, annotation = ast.unparse(item.target), ast.unparse(item.annotation)
    if annotation.startswith("ClassVar") or name.startswith("_"):
        return None
    value = item.value
    if isinstance(value, ast.Call) and _name(value.func) in ("field", "static"):
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    return f"{name}: {annotation}" + ("" if value is None else f" = {ast.unparse(value)}")


def _name(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def find_ours(app, env, node, contnode):
    """Resolve a name of ours that a signature of another module writes without its module."""
    domain, target = env.get_domain("py"), node.get("reftarget", "")
    found = [
        full for full in domain.objects if full.rpartition(".")[2] == target.rpartition(".")[2]
    ]
    if node.get("refdomain") != "py" or not found:
        return None
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], min(found, key=len), node, contnode
    )


def setup(app):
    analyze = ModuleAnalyzer.analyze

    def without_overloads(self):
        """Show one signature, that of the function itself, which names every argument."""
        analyze(self)
        self.overloads = {}

    ModuleAnalyzer.analyze = without_overloads
    app.connect("autodoc-process-docstring", write_sections, priority=400)  # Before napoleon.
    app.connect("autodoc-process-signature", write_signature)
    app.connect("missing-reference", find_ours)
