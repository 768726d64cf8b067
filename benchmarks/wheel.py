"""Test the package installed from its wheel only: ``python -m benchmarks.wheel``.

Builds the wheel, installs it with torch and its dependencies from the registry into an empty venv, and runs there,
outside the source tree: import, ``ds_alst report``, the csrc/ ops, and a program without any reference to the package,
trained by ``deepspeed`` on two ranks that share a sequence and on one that does not. One line per check, with its
seconds; exit status 1 if one fails. With ``--quick`` the venv uses the packages of this one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed_alst.cli.launch import free_port

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"  # as in the Makefile, for the same reason
STEPS, TOLERANCE = 3, 1e-5

_OPS = """
import json
from deepspeed_alst.kernels.builder import load
print(json.dumps({"sum_pieces": load("cpu")}))
"""
# Two samples per step for any number of ranks: one epoch is one step.
_PROGRAM = f"""
import json, sys
import deepspeed, torch
from transformers import AutoModelForCausalLM, LlamaConfig
torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(config)
ids = torch.randint(97, (2, 61))
data = [{{"input_ids": row, "labels": row}} for row in ids]
engine, _, loader, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), training_data=data,
                                            config=sys.argv[-2])
losses = []
for step in range({STEPS}):
    total = 0.0
    for batch in loader:
        loss = engine(**{{name: value.to(engine.device) for name, value in batch.items()}}).loss
        engine.backward(loss)
        engine.step()
        total += loss.item()
    losses.append(total / 2)
if torch.distributed.get_rank() == 0:
    with open(sys.argv[-1], "w") as file:
        json.dump({{"losses": losses, "engine": hasattr(engine, "alst")}}, file)
"""
_DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 1000000,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}
_SEQUENCE_PARALLEL = {
    "sequence_parallel_size": 2,
    "alst": {
        "tiled_mlp_compute": {"tile_tokens": 8, "min_tokens": 0},
        "tiled_logits_loss": {"tile_tokens": 8},
    },
}


class CheckFailedError(Exception):
    """Failure of a check, with the unexpected finding."""


def copy_checkout(folder: Path) -> Path:
    """Copy the files setup.py needs, without binaries, as setuptools builds inside the source tree."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "_deepspeed_alst_autoload.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("deepspeed_alst", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


class Clean:
    """A venv, and a working folder outside the source tree.

    Args:
        folder: for both.
        quick: use the packages of the running interpreter.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.work = folder / "work"
        self.python = folder / "venv" / "bin" / "python"
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment["PATH"] = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        self.environment["DS_ACCELERATOR"] = "cpu"
        if not quick:
            self.environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")

    def make(self) -> str:
        """Create the venv; return a description of its initial packages."""
        self.work.mkdir()
        _run([sys.executable, "-m", "venv", str(self.folder / "venv")], self.folder, dict(os.environ))
        if self.quick:
            borrowed = sysconfig.get_path("purelib")
            (site,) = self.folder.glob("venv/lib/python*/site-packages")
            # Its .pth files are not processed from here, which excludes an editable installation of the package.
            (site / "borrowed.pth").write_text(borrowed + "\n", encoding="utf-8")
            return f"with the packages of {borrowed}"
        self.run("-m", "pip", "install", "--quiet", TORCH)
        return f"{TORCH} from the registry"

    def run(self, *words: str) -> str:
        """Run a Python command in the venv; return its output, stdout last.

        Raises:
            CheckFailedError: it fails.
        """
        return _run([str(self.python), *words], self.work, self.environment)


def build(folder: Path) -> str:
    """Build the wheel and check that it holds all modules and sources and nothing else."""
    source = copy_checkout(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_BUILD")}
    _run(command, folder, {**environment, "PYTHONPATH": ""})
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(source)) for path in (source / "deepspeed_alst").rglob("*.py")}
    sources = {f"deepspeed_alst/{path.relative_to(source)}" for path in (source / "csrc").rglob("*") if path.is_file()}
    _want(not (modules | sources) - names, f"lacks {sorted((modules | sources) - names)}")
    foreign = {name for name in names if name.startswith(("tests", "benchmarks", "examples"))}
    _want(not foreign, f"brings {sorted(foreign)}")
    size = wheel.stat().st_size / 1000
    return f"{wheel.name}, {size:.0f} kB: {len(modules)} modules, {len(sources)} sources of csrc"


def install(clean: Clean, wheel: Path) -> str:
    """Install the wheel with its dependencies."""
    clean.run("-m", "pip", "install", "--quiet", *(["--no-deps"] if clean.quick else []), str(wheel))
    script = clean.python.with_name("ds_alst")
    _want(script.exists(), f"{script} is missing")
    if clean.quick:
        return "without its dependencies"
    clean.run("-m", "pip", "check")
    return f"{len(clean.run('-m', 'pip', 'freeze').splitlines())} packages, none in conflict"


def imports(clean: Clean) -> str:
    """Check that ``import torch`` loads the package from the venv."""
    code = "import sys, torch; print(sys.modules['deepspeed_alst'].__file__)"
    file = clean.run("-c", code).splitlines()[-1]
    _want(Path(file).is_relative_to(clean.folder / "venv"), f"import torch loads {file}")
    return "import torch loads deepspeed_alst from the venv"


def report(clean: Clean) -> str:
    """Check that ``ds_alst report --json`` finds no problem."""
    command = [str(clean.python.with_name("ds_alst")), "report", "--json"]
    # Its exit status only tells that there is a problem.
    done = subprocess.run(command, cwd=clean.work, env=clean.environment, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout)
    problems = [f"{row['name']}: {row['value']}" for row in rows if row["verdict"] == "problem"]
    _want(not problems, "; ".join(problems))
    notes = [row["name"] for row in rows if row["verdict"] == "note"]
    return f"{len(rows)} rows, no problem; notes on {', '.join(notes) or 'none'}"


def ops(clean: Clean) -> str:
    """Check the csrc/ ops, built from the sources in the wheel."""
    words = json.loads(clean.run("-c", _OPS).splitlines()[-1])
    _want(set(words.values()) == {"csrc op"}, str(words))
    return ", ".join(words)


def train(clean: Clean) -> str:
    """Compare losses of three steps on two ranks that share sequences, and on one with whole ones."""
    program = clean.work / "train.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    alone, _ = _train(clean, program, "sp1", 1, _DS_CONFIG)
    shared, output = _train(clean, program, "sp2", 2, {**_DS_CONFIG, **_SEQUENCE_PARALLEL})
    _want(shared["engine"] and not alone["engine"], "sequence parallelism is not where the ds_config has it")
    _want("2 ranks share a sequence" in output, f"no activation report: {output[-2000:]}")
    _want(alone["losses"][-1] < 0.999 * alone["losses"][0], f"the loss does not fall: {alone['losses']}")
    apart = max(abs(a - b) / a for a, b in zip(alone["losses"], shared["losses"], strict=True))
    _want(apart <= TOLERANCE, f"losses {shared['losses']} at SP 2, {alone['losses']} at SP 1")
    return f"loss {shared['losses'][0]:.4f} to {shared['losses'][-1]:.4f} at SP 2, within {apart:.1e} of SP 1"


def _train(clean: Clean, program: Path, name: str, ranks: int, ds_config: dict) -> tuple[dict, str]:
    config, result = clean.work / f"{name}.json", clean.work / f"{name}_losses.json"
    config.write_text(json.dumps(ds_config), encoding="utf-8")
    launcher = clean.python.with_name("deepspeed")
    command = [str(clean.python), *([str(launcher)] if launcher.exists() else ["-m", "deepspeed.launcher.runner"])]
    port = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
    output = _run([*command, *port, str(program), str(config), str(result)], clean.work, clean.environment)
    return json.loads(result.read_text(encoding="utf-8")), output


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run a command; return its stderr followed by its stdout."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CheckFailedError(f"{' '.join(command[:4])} ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stderr + done.stdout


def _want(true: bool, otherwise: str) -> None:
    if not true:
        raise CheckFailedError(otherwise)


@contextmanager
def _workplace(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="alst-wheel-") as folder:
        yield Path(folder).resolve()


def main() -> int:
    """Run all checks in order of dependency; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="borrow this environment's packages: the wheel alone")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder, and leave it")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    with _workplace(arguments.keep) as folder:
        clean = Clean(folder, arguments.quick)
        checks: list[tuple[str, Callable[[], str]]] = [
            ("wheel", lambda: build(folder)),
            ("venv", clean.make),
            ("install", lambda: install(clean, next(folder.glob("*.whl")))),
            ("import", lambda: imports(clean)),
            ("report", lambda: report(clean)),
            ("ops", lambda: ops(clean)),
            ("train", lambda: train(clean)),
        ]
        for name, check in checks:
            start = time.perf_counter()
            try:
                words = check()
            except CheckFailedError as error:
                print(f"FAILED {name}: {error}", flush=True)
                return 1
            print(f"ok {name} ({time.perf_counter() - start:.0f} s): {words}", flush=True)
    print(f"the wheel works: {len(checks)} checks in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
