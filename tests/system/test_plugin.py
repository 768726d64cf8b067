"""How the package gets loaded: real programs, each a Python process of its own, in every order of imports."""

import argparse
import base64
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepspeed_alst.hooks import find_config, is_wanted

# What every program starts with: `out` is printed as JSON at its end; nothing here imports torch.
HEAD = """
import json, sys
out = {}
def mark(function):
    return hasattr(function, "__deepspeed_alst__")
def attempt(function, *args, **kwargs):
    try:
        return ["returned", repr(function(*args, **kwargs))]
    except Exception as error:
        return [type(error).__name__, str(error)]
def loaded(name):
    return name in sys.modules
def our_finders():
    ours = [finder for finder in sys.meta_path if type(finder).__module__ == "deepspeed_alst.autoload"]
    return sum(finder.name == "deepspeed" for finder in ours)
"""
TAIL = """
print("RESULT " + json.dumps(out))
"""

# The package is there and cannot be used: a half-removed installation.
BROKEN = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "deepspeed_alst.hooks":
            raise ImportError("broken on purpose")
sys.meta_path.insert(0, Blocker())
"""

LIST_MODULES = """
import torch
out["modules"] = sorted(sys.modules)
out["finders"] = our_finders()
"""

TORCH_THEN_DEEPSPEED = """
import importlib.util, inspect
import torch
importlib.util.find_spec("deepspeed")  # as transformers and accelerate do, to see whether it is installed
import deepspeed

out["hooked"] = mark(deepspeed.initialize)
out["finders"] = our_finders()
original = deepspeed.initialize.__deepspeed_alst__
out["looks alike"] = (
    inspect.signature(deepspeed.initialize) == inspect.signature(original)
    and deepspeed.initialize.__doc__ == original.__doc__
    and deepspeed.initialize.__name__ == original.__name__
)

from deepspeed_alst import autoload
for _ in range(3):
    autoload.install()
    autoload.install()
out["hooked once"] = deepspeed.initialize.__deepspeed_alst__ is original and not mark(original)

plain = {"train_micro_batch_size_per_gpu": 1}
out["calls"] = {
    "no arguments": attempt(deepspeed.initialize),
    "an unknown argument": attempt(deepspeed.initialize, nonsense=1),
    "too many arguments": attempt(deepspeed.initialize, *range(20)),
    "a plain config": attempt(deepspeed.initialize, config=plain),
    "a plain config by position": attempt(deepspeed.initialize, *[None] * 10, plain),
    "an mpu": attempt(deepspeed.initialize, mpu=object(), config={"sequence_parallel_size": 2, **plain}),
    "no such file": attempt(deepspeed.initialize, config="/no/such/file.json"),
}
out["the package stayed out"] = not loaded("deepspeed_alst.initialize") and not loaded("transformers")
out["original calls"] = {
    "no arguments": attempt(original),
    "an unknown argument": attempt(original, nonsense=1),
    "too many arguments": attempt(original, *range(20)),
    "a plain config": attempt(original, config=plain),
    "a plain config by position": attempt(original, *[None] * 10, plain),
    "an mpu": attempt(original, mpu=object(), config={"sequence_parallel_size": 2, **plain}),
    "no such file": attempt(original, config="/no/such/file.json"),
}
ours = {"alst": {"zzz": 1}, **plain}
out["our calls"] = [
    attempt(deepspeed.initialize, config=ours),
    attempt(deepspeed.initialize, config_params=ours),
    attempt(deepspeed.initialize, *[None] * 10, ours),
]

from deepspeed_alst.core.patching import unwrap
unwrap(deepspeed, "initialize")
out["unhooked"] = deepspeed.initialize is original
"""

DEEPSPEED_FIRST = """
from deepspeed import initialize
import deepspeed
out["of the name"] = mark(initialize) and deepspeed.initialize is initialize
out["torch came with it"] = loaded("torch")
out["hooked"] = mark(deepspeed.initialize)
out["class"] = type(deepspeed).__name__
out["finders"] = our_finders()
original = deepspeed.initialize.__deepspeed_alst__
import deepspeed_alst
deepspeed_alst.autoload.install()
out["hooked once"] = deepspeed.initialize.__deepspeed_alst__ is original and not mark(original)
from deepspeed_alst.core.patching import unwrap
unwrap(deepspeed, "initialize")
out["unhooked"] = deepspeed.initialize is original
"""

ALST_THEN_DEEPSPEED = """
import deepspeed_alst
out["imported"] = [name for name in ("torch", "deepspeed", "pydantic", "transformers") if loaded(name)]
out["public"] = dir(deepspeed_alst)
out["unknown"] = attempt(getattr, deepspeed_alst, "zzz")
import deepspeed
out["hooked"] = mark(deepspeed.initialize)
out["names"] = {name: attempt(getattr, deepspeed_alst, name)[0] for name in dir(deepspeed_alst)}
"""

DEEPSPEED_THEN_ALST = """
import deepspeed
out["untouched"] = not mark(deepspeed.initialize) and type(deepspeed).__name__ == "module"
out["package"] = sorted(name for name in sys.modules if name.startswith("deepspeed_alst"))
import deepspeed_alst
out["hooked"] = mark(deepspeed.initialize)
"""

TORCH_THEN_DEEPSPEED_THEN_ALST = "import torch" + DEEPSPEED_THEN_ALST

BROKEN_TORCH = """
import torch
out["sum"] = torch.ones(3).sum().item()
"""

BROKEN_DEEPSPEED_FIRST = """
out["deepspeed"] = attempt(__import__, "deepspeed")
import torch
out["sum"] = torch.ones(3).sum().item()
"""

# A stand-in of the same name: what a program puts there to do without DeepSpeed, or another package altogether.
STAND_IN = """
import types
sys.modules["deepspeed"] = types.ModuleType("deepspeed")
import torch
out["sum"] = torch.ones(3).sum().item()
"""

OFF = {"DEEPSPEED_ALST_AUTOLOAD": "0"}
ALL_OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
PROGRAMS = {
    "torch alone": (LIST_MODULES, {}),
    "torch alone, all autoload off": (LIST_MODULES, ALL_OFF),
    "torch, deepspeed": (TORCH_THEN_DEEPSPEED, {}),
    "deepspeed first": (DEEPSPEED_FIRST, {}),
    "alst, deepspeed, all autoload off": (ALST_THEN_DEEPSPEED, ALL_OFF),
    "deepspeed, alst, all autoload off": (DEEPSPEED_THEN_ALST, ALL_OFF),
    "deepspeed, alst, our autoload off": (DEEPSPEED_THEN_ALST, OFF),
    "torch, deepspeed, alst, our autoload off": (TORCH_THEN_DEEPSPEED_THEN_ALST, OFF),
    "broken, torch": (BROKEN + BROKEN_TORCH, {}),
    "broken, deepspeed first": (BROKEN + BROKEN_DEEPSPEED_FIRST, {}),
    "stand-in": (STAND_IN, {}),
    "broken, stand-in": (BROKEN + STAND_IN, {}),
}


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


def _run(program: str, environment: dict[str, str], folder: Path) -> dict:
    cleared = ("DEEPSPEED_ALST_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH")
    inherited = {key: value for key, value in os.environ.items() if key not in cleared}
    # Another folder than the repository's: the package is found as installed, not by the current directory.
    done = subprocess.run(
        [sys.executable, "-c", HEAD + program + TAIL],
        env={**inherited, "DS_ACCELERATOR": "cpu", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        return {"failed": done.stderr[-3000:]}
    return json.loads(results[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")

    @functools.cache
    def of(name: str) -> dict:
        found = _run(*PROGRAMS[name], folder)
        assert "failed" not in found, f"the program '{name}' failed:\n{found['failed']}"
        return found

    return of


# --- import torch


def test_import_torch_alone_loads_the_hook_and_nothing_else(result):
    on, off = (set(result(name)["modules"]) for name in ("torch alone", "torch alone, all autoload off"))
    new = {name for name in on - off if name.split(".")[0] not in sys.stdlib_module_names}
    allowed = {
        "_deepspeed_alst_autoload",
        "deepspeed_alst",
        "deepspeed_alst.autoload",
        "__editable___deepspeed_alst_0_1_0_finder",
    }
    assert new <= allowed, sorted(new - allowed)
    assert "deepspeed_alst.autoload" in new, "the entry point was not called: is the package installed?"
    assert not on & {"pydantic", "deepspeed", "transformers", "rich"}
    assert result("torch alone")["finders"] == 1 and result("torch alone, all autoload off")["finders"] == 0


@pytest.mark.parametrize(
    "name",
    [slow("broken, torch"), "broken, deepspeed first", slow("stand-in"), "broken, stand-in"],
)
def test_a_broken_package_or_another_deepspeed_never_makes_import_torch_fail(result, name):
    assert result(name)["sum"] == 3.0


# --- the hook


def test_the_hook_is_there_after_torch_and_then_deepspeed(result):
    got = result("torch, deepspeed")
    assert got["hooked"] and got["hooked once"] and got["looks alike"]
    assert got["finders"] == 0, "its work is done"


def test_the_hook_is_there_where_deepspeed_is_imported_first_and_brings_torch(result):
    got = result("deepspeed first")
    assert got["torch came with it"]
    assert got["hooked"] and got["hooked once"]
    assert got["class"] == "module", "the module is an ordinary one again"
    assert got["finders"] == 0


def test_the_hook_is_there_for_a_name_imported_from_deepspeed(result):
    assert result("deepspeed first")["of the name"]


def test_the_hook_is_there_with_autoload_off_where_the_package_is_imported_before_deepspeed(result):
    assert result("alst, deepspeed, all autoload off")["hooked"]


@pytest.mark.parametrize(
    "name",
    [
        slow("deepspeed, alst, all autoload off"),
        slow("deepspeed, alst, our autoload off"),
        "torch, deepspeed, alst, our autoload off",
    ],
)
def test_with_autoload_off_deepspeed_is_untouched_until_the_package_is_imported(result, name):
    got = result(name)
    assert got["untouched"]
    assert "deepspeed_alst.hooks" not in got["package"]
    assert got["hooked"], "import deepspeed_alst, after deepspeed, did not install the hook"


def test_importing_the_package_imports_nothing_heavy_and_shows_its_public_names(result):
    got = result("alst, deepspeed, all autoload off")
    assert got["imported"] == []
    assert {"ConfigError", "shard_dataloader", "__version__"} <= set(got["public"])
    assert got["unknown"][0] == "AttributeError" and "zzz" in got["unknown"][1]
    assert set(got["names"].values()) == {"returned"}, "every public name can be had"


@pytest.mark.parametrize("name", ["torch, deepspeed", "deepspeed first"])
def test_the_hook_can_be_taken_back(result, name):
    assert result(name)["unhooked"]


# --- the gate


def test_a_call_that_is_not_for_us_ends_as_without_the_hook_and_loads_nothing(result):
    got = result("torch, deepspeed")
    assert got["calls"] == got["original calls"]
    assert got["calls"]["no arguments"] == ["AssertionError", "deepspeed.initialize requires a model"]
    assert got["calls"]["an unknown argument"][0] == "TypeError"
    assert got["the package stayed out"]


def test_a_call_with_our_keys_is_ours_however_the_config_is_passed(result):
    calls = result("torch, deepspeed")["our calls"]
    assert [kind for kind, _ in calls] == ["ConfigError"] * 3
    assert all(message.startswith("alst.zzz: unknown key. Known are pad_to_multiple_of, ") for _, message in calls)


# --- find_config


DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "sequence_parallel_size": 2}


@pytest.fixture
def path(tmp_path):
    """The ds_config as a file, with a comment as DeepSpeed allows it."""
    file = tmp_path / "ds.json"
    file.write_text("# a comment\n" + json.dumps(DS_CONFIG))
    return str(file)


def args(value, name: str = "deepspeed_config") -> argparse.Namespace:
    return argparse.Namespace(local_rank=0, **{name: value})


def test_a_config_is_found_as_a_dict_a_path_or_base64_wherever_deepspeed_takes_it(path):
    encoded = base64.urlsafe_b64encode(json.dumps(DS_CONFIG).encode()).decode()
    for given in (DS_CONFIG, path, encoded):
        assert find_config({"config": given}) == DS_CONFIG
        assert find_config({"config_params": given}) == DS_CONFIG
        assert find_config({"args": args(given)}) == DS_CONFIG


def test_a_dict_is_handed_on_and_not_copied():
    assert find_config({"config": DS_CONFIG}) is DS_CONFIG


def test_config_goes_before_config_params():
    assert find_config({"config": DS_CONFIG, "config_params": {"other": 1}}) is DS_CONFIG
    assert find_config({"config": None, "config_params": DS_CONFIG}) is DS_CONFIG


def test_the_old_name_of_the_argument_is_found_as_deepspeed_finds_it(path):
    assert find_config({"args": args(path, name="deepscale_config")}) == DS_CONFIG


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"config": None, "config_params": None, "args": None},
        {"args": args(None)},
        {"args": argparse.Namespace()},
        {"config": "/no/such/file.json"},
        {"config": "/"},
        {"config": 5},
        {"config": ["alst"]},
    ],
    ids=repr,
)
def test_a_config_that_is_not_there_or_not_readable_is_none_and_left_to_deepspeed(arguments):
    assert find_config(arguments) is None


@pytest.mark.parametrize("content", ['{"alst": ', '{"alst": {}, "alst": {}}', ""], ids=["cut", "twice", "empty"])
def test_a_file_that_is_no_json_object_is_left_to_deepspeed(tmp_path, content):
    file = tmp_path / "ds.json"
    file.write_text(content)
    assert not is_wanted(find_config({"config": str(file)}))


# --- is_wanted


AUTOSP = {"compile": {"deepcompile": True, "passes": ["autosp"]}}


@pytest.mark.parametrize(
    ("ds_config", "mpu", "wanted"),
    [
        ({"tiled_mlp_compute": True}, None, True),
        ({"activation_checkpoint_cpu_offload": True, "sequence_parallel_size": 1}, None, True),
        ({"liger_kernel": True}, None, False),
        ({"ALST": {}}, None, False),
        ({"sequence_parallel_size": 2, "data_parallel_size": 1}, None, False),
        ({"sequence_parallel_size": 2, "data_parallel_size": 1, "alst": {}}, None, True),
        ({"sequence_parallel_size": 1.0}, None, False),
        ({"sequence_parallel_size": True}, None, True),
        (None, None, False),
        ("text", None, False),
        ({}, None, False),
        ({}, "an mpu", False),
        ({"bf16": {"enabled": True}}, None, False),
        ({"sequence_parallel_size": 1}, None, False),
        ({"sequence_parallel_size": 1, **AUTOSP}, None, False),
        ({"sequence_parallel_size": 2}, None, True),
        ({"sequence_parallel_size": 3}, None, True),
        ({"sequence_parallel_size": 2}, "an mpu", False),
        ({"sequence_parallel_size": 2, **AUTOSP}, None, False),
        ({"sequence_parallel_size": 2, **AUTOSP}, "an mpu", False),
        ({"sequence_parallel_size": 2, "compile": {"passes": ["z1"]}}, None, True),
        ({"sequence_parallel_size": 2, "compile": {"passes": None}}, None, True),
        ({"sequence_parallel_size": 2, "compile": {}}, None, True),
        ({"sequence_parallel_size": 2, "compile": None}, None, True),
        ({"sequence_parallel_size": 2, "compile": {"passes": 5}}, None, True),
        # Not a degree at all: ours to refuse by name, where DeepSpeed would ignore or divide by it.
        ({"sequence_parallel_size": 0}, None, True),
        ({"sequence_parallel_size": "2"}, None, True),
        ({"sequence_parallel_size": None}, None, True),
        ({"alst": {}}, None, True),
        ({"alst": None}, None, True),
        ({"alst": {}}, "an mpu", True),
        ({"alst": {}, "sequence_parallel_size": 1}, None, True),
        ({"alst": {}, "sequence_parallel_size": 2, **AUTOSP}, "an mpu", True),
    ],
    ids=repr,
)
def test_the_package_acts_on_an_alst_block_or_on_sp_without_an_mpu_and_without_autosp(ds_config, mpu, wanted):
    assert is_wanted(ds_config, mpu) is wanted


def test_a_mesh_that_is_passed_is_deepspeeds_own_sequence_parallelism():
    assert not is_wanted({"sequence_parallel_size": 2}, mesh=(1, 2))
    assert is_wanted({"sequence_parallel_size": 2, "alst": {}}, mesh=(1, 2))
