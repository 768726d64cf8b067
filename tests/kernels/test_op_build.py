"""How the compiled sum comes to be there: prebuilt, built at first use, or not, with real processes and compilers."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from torch.utils import cpp_extension

from deepspeed_alst.kernels.builder import LIBRARIES, OpBuildError, extension, load_or_build, source_folder
from tests.system.test_wheel import copy_checkout

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "programs" / "build_op.py"
# Notes each call, says when it has started on the op itself, and takes its time over it.
SLOW_COMPILER = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *-c*sum_pieces.cpp*) touch {started}; sleep {seconds};; esac
exec c++ "$@"
"""


def start(folder, *arguments, package=ROOT, **variables):
    """The program in a process of its own, with an empty home for builds unless it is given one."""
    environment = {**os.environ, "PYTHONPATH": str(package), "TORCH_EXTENSIONS_DIR": str(folder), **variables}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        env=environment,
        cwd=folder.parent,  # not the checkout, whose package would be found first
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What the program printed; it is right in any case, and without a warning if compiled."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    report = json.loads(out.splitlines()[-1])
    assert report["right"] and len(report["words"]) == 1
    assert report["compiled"] == (report["words"] == ["csrc op"]) == (report["warnings"] == [])
    return report


def compiler(tmp_path, seconds):
    script, log, started = tmp_path / "slow-c++", tmp_path / "calls", tmp_path / "started"
    script.write_text(SLOW_COMPILER.format(log=log, started=started, seconds=seconds))
    script.chmod(0o755)
    return str(script), log, started


def left_over(folder):
    """What is there beside the library and the lock, which nobody waits for once its holder is dead."""
    return [path.name for path in folder.glob("alst_ops/*/*") if path.suffix != ".so" and path.name != "builder"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a finished build."""
    folder = tmp_path_factory.mktemp("built") / "extensions"
    assert finish(start(folder))["words"] == ["csrc op"]
    return folder


@pytest.mark.slow
def test_a_build_that_was_killed_halts_no_later_one(tmp_path):
    folder = tmp_path / "extensions"
    slow, _, started = compiler(tmp_path, seconds=5)
    killed = start(folder, CXX=slow)
    while not started.exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    locks = list(folder.rglob("lock"))
    assert locks, "torch's lock is there, and so is the orphaned compiler: this is what is to be survived"
    locks[0].with_name("alst_ops.so").write_bytes(b"\x7fELF half a library")
    report = finish(start(folder))
    assert report["words"] == ["csrc op"] and report["seconds"] < 60
    assert left_over(folder) == []


@pytest.mark.slow
def test_two_builds_at_once_are_one(tmp_path):
    folder = tmp_path / "extensions"
    noted, log, _ = compiler(tmp_path, seconds=1)
    reports = [finish(process) for process in [start(folder, CXX=noted), start(folder, CXX=noted)]]
    assert [report["words"] for report in reports] == [["csrc op"]] * 2
    compilations = [line for line in log.read_text().splitlines() if " -c " in line and "sum_pieces.cpp" in line]
    assert len(compilations) == 1
    assert left_over(folder) == []


def test_a_built_op_needs_no_compiler_and_a_broken_one_is_built_again(built, tmp_path):
    folder = tmp_path / "extensions"
    shutil.copytree(built, folder)
    assert finish(start(folder, CXX="/nonexistent/c++"))["words"] == ["csrc op"]
    (library,) = folder.rglob("*.so")
    library.write_bytes(library.read_bytes()[:20])
    # And a first build that fails does not spoil a second one in its process, as torch's own count of builds would.
    report = finish(start(folder, "--after-a-failure"))
    assert report["words"] == ["csrc op"] and "failed.log" in report["failure"]
    assert finish(start(folder, CXX="/nonexistent/c++"))["words"] == ["csrc op"]


def test_without_a_compiler_torch_adds_and_says_so(tmp_path):
    report = finish(start(tmp_path / "extensions", CXX="/nonexistent/c++"))
    assert report["words"] == ["torch (no C++ compiler found (/nonexistent/c++))"]
    (warning,) = report["warnings"]  # once, though it was asked for twice
    assert "DS_BUILD_ALST=1" in warning and "g++" in warning


def test_without_ninja_the_error_says_so(tmp_path, monkeypatch):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    with pytest.raises(OpBuildError, match="ninja") as error:
        load_or_build("cpu")
    assert "pip install ninja" in error.value.fix


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "extensions", Path("/proc/extensions")):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        with pytest.raises(OpBuildError, match="cannot build in") as error:
            load_or_build("cpu")
        assert str(folder) in str(error.value) and "TORCH_EXTENSIONS_DIR" in error.value.fix


def test_a_file_system_without_locks_is_an_error_that_names_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    refused = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    with (
        mock.patch.object(fcntl, "flock", side_effect=refused),
        pytest.raises(OpBuildError, match="cannot build in") as error,
    ):
        load_or_build("cpu")
    assert str(tmp_path) in str(error.value) and "TORCH_EXTENSIONS_DIR" in error.value.fix


@pytest.mark.slow
def test_an_installed_package_brings_its_op_or_the_sources_of_it(tmp_path):
    installed, folder = tmp_path / "installed", tmp_path / "extensions"
    checkout = copy_checkout(tmp_path / "checkout")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run(
        [*install, "--disable-pip-version-check", "--root-user-action=ignore", "--target", installed, checkout],
        env={**os.environ, "DS_BUILD_ALST": "1", "PYTHONPATH": ""},
        check=True,
        timeout=180,
    )
    binaries = {path.name.split(".")[0]: path for path in (installed / "deepspeed_alst" / "kernels").glob("*.so")}
    assert binaries.keys() == {"alst_ops"}
    prebuilt = binaries["alst_ops"]
    report = finish(start(folder, package=installed, CXX="/nonexistent/c++"))
    assert report["package"] == str(installed / "deepspeed_alst") and report["words"] == ["csrc op"]
    assert not folder.exists(), "nothing was built"
    prebuilt.write_bytes(b"of an interrupted copy")
    assert finish(start(folder, package=installed))["words"] == ["csrc op"]
    assert list(folder.rglob("*.so")), "built from the sources that were installed"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here: no CUDA op is built")
def test_the_cuda_op_is_built_ahead_for_three_architectures_and_without_fast_math(monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(Path(shutil.which("nvcc")).parent.parent))
    op = extension("cuda")
    flags = " ".join(op.extra_compile_args["nvcc"])
    assert [Path(each).name for each in op.sources] == ["sum_pieces.cu"]
    assert all(f"code=sm_{each}" in flags for each in (80, 90, 100)) and "fast" not in flags


def test_setup_loads_no_torch_unless_it_is_asked_to():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "setup.py", "--version"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("DS_BUILD_ALST")},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.strip() and "setuptools" in done.stderr
    assert not any(line.split("|")[-1].strip() in ("torch", "deepspeed") for line in done.stderr.splitlines())


def test_libraries_have_names_of_their_own_and_sources_that_are_there():
    assert list(LIBRARIES.values()) == ["alst_ops", "alst_ops_cuda"]
    assert [Path(source).is_file() for source in extension("cpu").sources] == [True]
    assert source_folder() == ROOT / "csrc"
