"""The package installed from its wheel alone; ``make wheel`` prints a line for each check.

The venv borrows this environment's packages; with FULL=1 it has torch and the dependencies from the registry.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from deepspeed_alst.cli.launch import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
FULL = bool(os.environ.get("FULL"))
TORCH = "torch==2.13.0"  # as in the Makefile, for the same reason
TOLERANCE = 1e-5
HIDDEN = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")

# Knows nothing of the package. Two samples per step for any number of ranks: one epoch is one step.
PROGRAM = """
import json, sys
import deepspeed, torch
from transformers import AutoModelForCausalLM, LlamaConfig
torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(config)
data = [{"input_ids": row, "labels": row} for row in torch.randint(97, (2, 61))]
engine, _, loader, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), training_data=data,
                                            config=sys.argv[-2])
losses = []
for step in range(3):
    total = 0.0
    for batch in loader:
        loss = engine(**{name: value.to(engine.device) for name, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        total += loss.item()
    losses.append(total / 2)
if torch.distributed.get_rank() == 0:
    with open(sys.argv[-1], "w") as file:
        json.dump({"losses": losses, "engine": hasattr(engine, "alst")}, file)
"""
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 1000000,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}
TILES = {"tiled_mlp_compute": {"tile_tokens": 8, "min_tokens": 0}, "tiled_logits_loss": {"tile_tokens": 8}}


def copy_checkout(folder: Path) -> Path:
    """The files setup.py needs, without binaries, as setuptools builds inside the source tree."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "_deepspeed_alst_autoload.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("deepspeed_alst", "csrc", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


class Clean:
    """A venv with the wheel, and a working folder outside the source tree."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        self.environment = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        self.environment |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
        if FULL:
            self.environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert not (check and done.returncode), f"{words[:4]}: {done.stderr[-3000:]}"
        return done

    def python(self, *words: str) -> str:
        return self.run(str(self.bin / "python"), *words).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(folder / "source")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_BUILD")}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(command, env={**environment, "PYTHONPATH": ""}, check=True)
    return source, next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory):
    clean = Clean(tmp_path_factory.mktemp("clean"))
    subprocess.run([sys.executable, "-m", "venv", clean.folder / "venv"], check=True)
    if FULL:
        clean.python("-m", "pip", "install", "--quiet", TORCH)
    else:
        (site,) = clean.folder.glob("venv/lib/python*/site-packages")
        # Its .pth files are not processed from here, which excludes an editable installation of the package.
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    clean.python("-m", "pip", "install", "--quiet", *([] if FULL else ["--no-deps"]), str(built[1]))
    return clean


def test_the_wheel_has_all_modules_and_sources_and_nothing_else(built):
    source, wheel = built
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(source)) for path in (source / "deepspeed_alst").rglob("*.py")}
    files = (path for name in ("csrc", "ds_configs") for path in (source / name).rglob("*") if path.is_file())
    sources = {f"deepspeed_alst/{path.relative_to(source)}" for path in files}
    assert (modules | sources) - names == set()
    assert {name for name in names if name.startswith(("tests", "benchmarks", "examples"))} == set()
    size = f"{wheel.stat().st_size / 1000:.0f} kB"
    print(f"{wheel.name}, {size}: {len(modules)} modules, {len(sources)} files of csrc and ds_configs")


def test_import_torch_loads_the_package_from_the_venv(clean):
    file = clean.python("-c", "import sys, torch; print(sys.modules['deepspeed_alst'].__file__)").splitlines()[-1]
    assert Path(file).is_relative_to(clean.folder / "venv")
    if FULL:
        clean.python("-m", "pip", "check")
        print(f"{len(clean.python('-m', 'pip', 'freeze').splitlines())} packages, none in conflict")


def test_the_report_finds_no_problem(clean):
    # Its exit status only tells that there is a problem.
    rows = json.loads(clean.run(str(clean.bin / "ds_alst"), "report", "--json", check=False).stdout)
    assert [f"{row['name']}: {row['value']}" for row in rows if row["verdict"] == "problem"] == []
    print(f"{len(rows)} rows, notes on {[row['name'] for row in rows if row['verdict'] == 'note']}")


def test_the_op_is_built_from_the_sources_in_the_wheel(clean):
    code = "from deepspeed_alst.kernels.builder import load; print(load('cpu'))"
    assert clean.python("-c", code).splitlines()[-1] == "csrc op"


def train(clean: Clean, name: str, ranks: int, ds_config: dict) -> tuple[dict, str]:
    program, config, result = (clean.folder / f"{name}{each}" for each in (".py", ".json", "_losses.json"))
    program.write_text(PROGRAM, encoding="utf-8")
    config.write_text(json.dumps(ds_config), encoding="utf-8")
    launcher = [str(clean.bin / "python"), "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    done = clean.run(*launcher, "--master_port", str(free_port()), *map(str, (program, config, result)))
    return json.loads(result.read_text(encoding="utf-8")), done.stderr + done.stdout


def test_two_ranks_train_as_one_does(clean):
    alone, _ = train(clean, "sp1", 1, DS_CONFIG)
    shared, output = train(clean, "sp2", 2, {**DS_CONFIG, "sequence_parallel_size": 2, "alst": TILES})
    assert shared["engine"] and not alone["engine"]
    assert "2 ranks per sequence" in output
    assert alone["losses"][-1] < 0.999 * alone["losses"][0]
    apart = max(abs(a - b) / a for a, b in zip(alone["losses"], shared["losses"], strict=True))
    print(f"losses {shared['losses']} at SP 2, within {apart:.1e} of SP 1 (target: {TOLERANCE})")
    assert apart <= TOLERANCE
