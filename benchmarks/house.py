"""Measure the package: its size, and the modules that a plain run loads, beside their goals.

    python -m benchmarks.house

Prints each figure beside its goal; exits non-zero where one is missed. The modules are those that a plain ZeRO-3 run
with ``sequence_parallel_size`` alone has loaded after one optimizer step.
"""

import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.figures import Figure, Part, report
from tests.core.test_patching import EXEMPT

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deepspeed_alst"
SUPPORT = ("conftest", "liger_interpreter", "models", "sabotage", "upstream_programs", "stand_ins/*")
VAGUE = ("What", "Whether", "Which", "How", "Of")
# How a model's parts are found, and the names of tolerances.
_PARTS = re.compile(
    r"get_(?:out|in)put_embeddings\(|, GradientCheckpointingLayer\)|_can_record_outputs|get_base_model\("
    r"|isinstance\([^)]*ModuleList|\"num_(?:local_)?experts\""
)
_TOLERANCE = re.compile(r"^_?(?:SLACK\w*|ULPS|EXACT|MOST|\w*TOLERANCE|\w*ROUNDINGS)\b.* = [\d.e, -]+$", re.M)
# Runs on every rank; rank 0 prints the package's modules.
_STEP = """
import sys, torch, deepspeed, torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "sequence_parallel_size": 2,
             "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}}
data = [{"input_ids": torch.arange(32), "labels": torch.arange(32)} for _ in range(4)]
engine, _, loader, _ = deepspeed.initialize(model=LlamaForCausalLM(config), config=ds_config, training_data=data)
for batch in loader:
    engine.backward(engine(**batch).loss)
    engine.step()
if dist.get_rank() == 0:
    print("LOADED", *sorted(name for name in sys.modules if name.startswith("deepspeed_alst")))
"""


def lines_of(paths: Iterable[Path]) -> tuple[int, int]:
    """Count physical lines, and lines with code: no comments, docstrings or blanks."""
    physical = logical = 0
    for path in paths:
        source = path.read_text(encoding="utf-8")
        physical += source.count("\n")
        logical += _logical(source) if path.suffix == ".py" else sum(_is_code(line) for line in source.splitlines())
    return physical, logical


def _logical(source: str) -> int:
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        bare = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if bare:
            code -= set(range(node.lineno, node.end_lineno + 1))
    return len(code)


def _is_code(line: str) -> bool:
    return bool(line.strip()) and not line.strip().startswith(("//", "/*", "*"))


def docstrings(paths: Iterable[Path]) -> list[str]:
    """Return the first lines of all docstrings of modules, classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds))
    return [found.splitlines()[0] for node in nodes if (found := ast.get_docstring(node))]


def loaded_after_a_step() -> list[str]:
    """Return the package's modules on rank 0 after a step with ``sequence_parallel_size`` alone."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "step.py"
        program.write_text(_STEP, encoding="utf-8")
        command = ["deepspeed", "--num_gpus", "2", "--master_port", "29655", str(program)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"LOADED (.*)", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"the step failed:\n{done.stdout}\n{done.stderr}")
    return found[1].split()


def _path_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def rows(loaded: list[str]) -> Iterator[Figure]:
    """Yield each figure with its goal, an upper bound."""
    package = sorted(PACKAGE.rglob("*.py"))
    initialize = (PACKAGE / "initialize.py").read_text(encoding="utf-8")
    rest = [*ROOT.glob("csrc/**/*.c*"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("benchmarks/**/*.py")]
    rest += [path for pattern in SUPPORT for path in ROOT.glob(f"tests/{pattern}.py")]
    physical, logical = lines_of(package)
    everything = lines_of([*package, *rest])
    ring = [_path_of(name) for name in loaded]
    sources = {path: path.read_text(encoding="utf-8") for path in package}
    elsewhere = "\n".join(text for path, text in sources.items() if path.name != "hf_model_spec.py")
    tolerances = sum(len(_TOLERANCE.findall(text)) for text in sources.values())
    first = docstrings(package)
    found: list[tuple[str, int, int | None]] = [
        ("package: lines", physical, 15_500),
        ("package: lines with code", logical, None),
        ("package: files", len(package), 95),
        ("with csrc, benchmarks, test support: lines", everything[0], None),
        ("with csrc, benchmarks, test support: lines with code", everything[1], None),
        ("loaded after a plain step: files", len(ring), 40),
        ("loaded after a plain step: lines", lines_of(ring)[0], 4_800),
        ("initialize.py: lines", initialize.count("\n"), 130),
        ("initialize.py: modules of the package that it imports", initialize.count("from deepspeed_alst"), 10),
        ("places outside hf_model_spec.py that look for a model's parts", len(_PARTS.findall(elsewhere)), 0),
        ("modules that change foreign objects without PatchSet", len(EXEMPT), 3),
        ("tolerances of numerical self-checks", tolerances, 6),
        (f"docstrings that begin with {', '.join(VAGUE)}", sum(each.split()[0] in VAGUE for each in first), 0),
        ("docstrings", len(first), None),
    ]
    for name, value, goal in found:
        yield Figure(name, (f"{value:,}",), "" if goal is None else f"<= {goal:,}", goal is None or value <= goal)


def files(loaded: list[str]) -> Iterator[Figure]:
    """Yield the lines of the modules of a plain step."""
    for name in loaded:
        yield Figure(name, (str(lines_of([_path_of(name)])[0]),))


def main() -> int:
    """Print the tables; 1 where a goal is missed."""
    loaded = loaded_after_a_step()
    parts = {
        "package": Part(lambda: rows(loaded)),
        "loaded after a plain step": Part(lambda: files(loaded), ("lines",)),
    }
    return report(__doc__, parts)


if __name__ == "__main__":
    sys.exit(main())
