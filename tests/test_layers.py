"""Dependencies point one way, third parties are fenced in, files and functions stay short: read from the sources.

LAYERS is the order of the folders. An import under ``if TYPE_CHECKING`` is not counted, as nothing is loaded by it.
transformers is imported by modules named hf_* alone.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "deepspeed_alst"
ROOT = Path(__file__).parent.parent / PACKAGE
# Folders and modules at the top of the package, from the bottom up. One imports those above it here; modules of a
# folder may use one another.
LAYERS = (
    *("errors", "formatting", "core", "config", "kernels", "profiler", "distributed", "environment", "data"),
    *("report", "random_draws", "attention", "linear_attention", "moe", "offload", "liger", "tiling", "memory_lean"),
    *("grad_reduction", "sequence_parallel", "whole_sequence", "multimodal", "verification"),
    *("checkpoint", "monitoring", "integrations", "features", "engine", "start", "initialize"),
    *("cli", "hooks", "autoload", "__main__", "__init__"),
)
# Where a third party may be imported: a folder, or one module of it.
FENCES = {
    "triton": {"kernels"},
    "liger_kernel": {"kernels", "liger"},
    "transformers": {"core.copying"},  # and modules named hf_*
    "matplotlib": {"profiler.picture"},
    "deepspeed": {
        *("checkpoint", "grad_reduction", "distributed.mesh", "environment", "core.feature", "start", "hooks", "cli"),
        *("integrations.hf_upstream", "kernels.builder", "monitoring.metrics"),
        "verification.hf_parity_trial",
    },
}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
MAX_KERNEL_LINES = 90

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if "__pycache__" not in path.parts
}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


def imports(name: str, source: str) -> Iterator[str]:
    """The full dotted name of whatever a module imports, at its top or inside a function; not of types alone."""
    package, tree = [PACKAGE, *name.split(".")[:-1]], ast.parse(source)
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    of_types = {id(child) for guard in guards for child in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in of_types:
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{each.name}" for each in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def layer_of(name: str) -> int:
    top = name.split(".")[0]
    return LAYERS.index(top)


def upward_imports(name: str, source: str) -> list[str]:
    """Imports of this package that point the wrong way."""
    found = []
    for each in imports(name, source):
        if each.split(".")[0] != PACKAGE:
            continue
        inner = each.split(".")[1:]
        # `import deepspeed_alst` is __init__; so is a name that is no module, as `from deepspeed_alst import X`.
        target = inner[0] if inner and (inner[0] in {n.split(".")[0] for n in MODULES}) else "__init__"
        if layer_of(target) > layer_of(name):
            found.append(each)
    return found


def fenced_imports(name: str, source: str) -> list[str]:
    """Imports of a third party outside of its fence."""
    inside = {name, name.split(".")[0]}
    return [
        each
        for each in imports(name, source)
        for party, fence in FENCES.items()
        if each.split(".")[0] == party
        and not inside & fence
        and not (party == "transformers" and name.split(".")[-1].startswith("hf_"))
    ]


def long_functions(source: str) -> list[str]:
    """Functions with more lines than allowed, decorators and docstring included; kernels may have more."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = node.end_lineno - first + 1
            if lines > (MAX_KERNEL_LINES if kernel else MAX_FUNCTION_LINES):
                found.append(f"{node.name}: {lines} lines")
    return found


def vague_docstrings(source: str) -> list[str]:
    """First lines of docstrings that begin with a question word instead of a verb or a noun."""
    blocks = [node.body for node in ast.walk(ast.parse(source)) if isinstance(getattr(node, "body", None), list)]
    strings = [each.value.value for body in blocks for each in body if isinstance(each, ast.Expr) and _is_string(each)]
    firsts = [string.strip().splitlines()[0] for string in strings]
    return [first for first in firsts if first.split()[0] in ("What", "Whether", "Which", "How", "Of")]


def _is_string(node: ast.Expr) -> bool:
    return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# --- the rules find what breaks them


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("errors", "from deepspeed_alst.config.schema import parse"),
        ("config.schema", "from deepspeed_alst.distributed.mesh import build_groups"),
        ("config.schema", "import deepspeed_alst.initialize"),
        ("distributed.sequence_loss", "from deepspeed_alst.data import loader"),
        ("distributed.sequence_loss", "from ..data import loader"),
        ("data.loader", "def f():\n    from deepspeed_alst.sequence_parallel.session import Session"),
        ("tiling.tiled_mlp", "from deepspeed_alst import initialize"),
        ("sequence_parallel.session", "from deepspeed_alst import shard_dataloader"),
        ("sequence_parallel.session", "import deepspeed_alst"),
        ("sequence_parallel.session", "import importlib\nimportlib.import_module('deepspeed_alst.hooks')"),
        ("initialize", "from .hooks import find_config"),
        ("initialize", "from deepspeed_alst.autoload import install"),
        ("initialize", "from deepspeed_alst.cli import report"),
        ("config.schema", "if not TYPE_CHECKING:\n    from deepspeed_alst.data import loader"),
    ],
)
def test_an_import_that_points_upward_is_found(name, source):
    assert upward_imports(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("data.loader", "import deepspeed"),
        ("distributed.collectives", "from deepspeed.utils import groups"),
        ("data.loader", "from deepspeed import comm as dist"),
        ("sequence_parallel.session", "import transformers.utils"),
        ("initialize", "def f():\n    from transformers import AutoModel"),
        ("tiling.tiled_mlp", "import triton.language as tl"),
        ("tiling.mlp", "__import__('triton')"),
        ("tiling.loss", "def f():\n    from liger_kernel.ops import LigerCrossEntropyFunction"),
        ("profiler.ledger", "def f():\n    import matplotlib.figure"),
    ],
)
def test_an_import_outside_of_its_fence_is_found(name, source):
    assert fenced_imports(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "verification.hf_support_checks",
            "from deepspeed_alst.config.config_file import nearest\nfrom ..errors import AlstError",
        ),
        ("data.sharding", "from deepspeed_alst.data.validation import check_mask"),
        ("core.feature", "if TYPE_CHECKING:\n    from deepspeed_alst.data.loader import ShardedDataLoader"),
        ("distributed.mesh", "from deepspeed.utils import groups"),
        ("kernels.softcap", "import triton"),
        ("attention.hf_one_rank", "import transformers"),
        ("start", "import deepspeed\nfrom deepspeed_alst.sequence_parallel.session import Session"),
        ("__init__", "from deepspeed_alst.autoload import install"),
        ("data.sharding", "import deepspeed_alst_of_another_name"),
    ],
)
def test_an_import_that_keeps_the_rules_is_not_found(name, source):
    assert not upward_imports(name, source) and not fenced_imports(name, source)


def test_a_function_that_is_too_long_is_found_and_a_kernel_may_be_longer():
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert long_functions(f"def f():\n{body}") == ["f: 51 lines"]
    assert long_functions(f"class C:\n    def f(self):\n{body.replace('    ', ' ' * 8)}")
    assert long_functions(f"def f():\n{body[: -len('    pass') - 1]}") == []
    assert long_functions(f"@triton.jit\ndef f():\n{body}") == []
    assert long_functions(f"@triton.jit\ndef f():\n{body}{body}") == ["f: 102 lines"]


def test_a_vague_docstring_is_found_and_a_field_s_too():
    assert vague_docstrings('"""What it does."""') == ["What it does."]
    assert vague_docstrings('class C:\n    x: int = 0\n    """Whether it is on."""') == ["Whether it is on."]
    assert vague_docstrings('def f():\n    """Return x."""\n    return "What"') == []


# --- and the package keeps them


def test_every_module_has_a_layer():
    assert len(MODULES) > 20, "the package was not found"
    tops = {name.split(".")[0] for name in MODULES}
    assert tops == set(LAYERS), "a new folder or module needs a place in LAYERS"


@pytest.mark.parametrize("name", MODULES)
def test_dependencies_point_one_way(name):
    assert upward_imports(name, SOURCES[name]) == []


@pytest.mark.parametrize("name", MODULES)
def test_third_parties_are_imported_where_they_belong(name):
    assert fenced_imports(name, SOURCES[name]) == []


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short_enough_to_be_read(name):
    lines = SOURCES[name].count("\n")
    assert lines <= MAX_FILE_LINES, f"{name} has {lines} lines"
    assert long_functions(SOURCES[name]) == []


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_begin_with_a_verb_or_a_noun(name):
    assert vague_docstrings(SOURCES[name]) == []


HEAVY = ("torch", "deepspeed", "transformers", "triton")
PURE = [name for name in MODULES if name.split(".")[0] in ("errors", "config")]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [(PURE, HEAVY), (["config.config_file"], (*HEAVY, "pydantic"))],
    ids=["pure", "of the gate"],
)
def test_the_pure_modules_load_neither_torch_nor_anything_that_needs_it(modules, heavy):
    # ast sees what is written; this sees that nothing is loaded in a roundabout way.
    names = ", ".join(f"{PACKAGE}.{name}" for name in modules)
    program = f"import sys, {names}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
