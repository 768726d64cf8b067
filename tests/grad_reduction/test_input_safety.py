"""What comes as data stays data: nothing of it is unpickled or run. A run writes where it may, and nowhere else."""

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspeed_alst.cli.launch import free_port, remove_shared_memory

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "programs" / "plain_loop.py"
SOURCES = sorted([*(ROOT / "deepspeed_alst").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *ROOT.glob("*.py")])

# Calls that run or unpickle what they are given, by the name that they are called by.
UNSAFE_NAMES = {"eval", "exec", "execfile", "__import__"}
UNSAFE_MODULES = {"dill", "cloudpickle", "marshal", "shelve", "jsonpickle", "joblib", "yaml"}
UNSAFE_ATTRIBUTES = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "os.system", "os.popen", "torch.hub.load"),
    *("dist.recv_object_list", "dist.broadcast_object_list", "dist.gather_object", "dist.all_gather_object"),
    *("dist.scatter_object_list", "torch.package.PackageImporter"),
}
# The few that there are, and why each is safe.
KNOWN = {
    # Checkpoints of DeepSpeed's, which holds enums and loss scalers in them: engine.load_checkpoint unpickles the very
    # same files right after. They are the run's own.
    "deepspeed_alst/checkpoint/universal.py": ["torch.load without weights_only"],
    # Between the ranks of one job, over its own group. A dataset's strings and numbers pass it as strings and numbers.
    "deepspeed_alst/data/exchange.py": ["torch.load without weights_only"],
    "deepspeed_alst/distributed/collectives.py": ["dist.all_gather_object"],
}


def unsafe(source: str) -> Iterator[str]:
    """The calls in a source that could run what is in a file or a batch."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from (f"import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES)
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch.serialization"):
                yield f"from {node.module} import"
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield str(node.arg)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE_NAMES or name in UNSAFE_ATTRIBUTES:
                yield name
            if name == "torch.load" and not any(
                each.arg == "weights_only" and isinstance(each.value, ast.Constant) and each.value.value is True
                for each in node.keywords
            ):
                yield "torch.load without weights_only"


def test_nothing_is_unpickled_or_run_but_what_is_known():
    found = {str(path.relative_to(ROOT)): list(unsafe(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == KNOWN


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=trusted)",
        "subprocess.run(command, shell=True)",
        "import yaml",
        "from pickle import loads",
        "dist.broadcast_object_list(x)",
    ],
)
def test_an_unsafe_call_would_be_found(line):
    assert list(unsafe(f"def f(x, path, text, name, safe, trusted, command):\n    {line}\n"))


@pytest.mark.parametrize("line", ["model.eval()", "torch.load(p, weights_only=True)", "spec.loader.exec_module(m)"])
def test_a_harmless_call_is_none(line):
    assert not list(unsafe(line))


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def short_folder():
    """Yield a folder with a short path: a DataLoader's workers bind a socket below TMPDIR, of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="run_", dir="/tmp") as folder:
        yield Path(folder)


def test_a_run_leaves_nothing_in_the_home_the_working_folder_or_the_offloads_disk(short_folder):
    """Tiles, offload to disk and the compiled ops; the last are kept in the cache of torch's extensions."""
    places = {name: short_folder / name for name in ("home", "work", "disk", "temporary")}
    for place in places.values():
        place.mkdir()
    port = free_port()
    environment = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"},
        **{"HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "DISK": str(places["disk"])},
        # Where ops are built, once for all runs of this user.
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        **{"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"},
    }
    try:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), "everything"],
                cwd=places["work"],
                env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in ("0", "1")
        ]
        outputs = [each.communicate(timeout=280)[0] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
        remove_shared_memory(port)
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0 and "trained" in output, output[-3000:]
    assert "on disk of a rank" in outputs[0], "the offload was to write"
    assert {name: files_under(place) for name, place in places.items()} == {name: [] for name in places}
