"""``ds_alst report`` in real environments: as it is, with torch or transformers broken, with what builds leave."""

import json
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepspeed_alst.cli import host, keys, main, packages, report
from deepspeed_alst.cli.device import allocator_row, build_row, driver_version, flash_row, gpu_rows
from deepspeed_alst.cli.rows import Row, print_table
from deepspeed_alst.errors import AlstError

ROOT = Path(__file__).parent.parent
GIB = 2**30


def run_report(*words, folder, first_in_path=None, **variables):
    """The command in a process of its own; its exit status, and its rows by name."""
    path = os.pathsep.join([*([str(first_in_path)] if first_in_path else []), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed_alst.cli", "report", "--json", *words],
        env={**os.environ, "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = json.loads(done.stdout)
    assert all(row.keys() == {"name", "value", "verdict", "remedy"} for row in rows), done.stderr
    return done.returncode, rows


def named(rows, name):
    found = [Row(**row) for row in rows if row["name"] == name]
    assert found, f"no row {name} in {[row['name'] for row in rows]}"
    return found


def broken_module(folder, name, sentence):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"raise ImportError({sentence!r})")
    return folder


# --- whole reports


def test_a_report_of_this_environment_with_a_stale_lock_and_no_compiler(tmp_path):
    left, held = (tmp_path / "extensions" / name / "lock" for name in ("deepspeed_shm_comm", "another_op"))
    for lock in (left, held):
        lock.parent.mkdir(parents=True)
    left.touch()
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"sequence_parallel_size": 2, "alst": {}}))
    words = ("--nvme_path", str(tmp_path), "--ds_config", str(config), "--num_gpus", "3")
    with held.open("w"):
        status, rows = run_report(*words, folder=tmp_path, CXX="/nonexistent/c++", PYTORCH_ALLOC_CONF="")
    assert status == 1
    (stale, building) = sorted(named(rows, "build lock"), key=lambda row: row.verdict, reverse=True)
    assert stale.verdict == "problem" and str(left) in stale.value and f"rm {left}" in stale.remedy
    assert building.verdict == "ok" and str(held) in building.value
    for name in ("op sum_pieces", "op tile_ops"):
        (op,) = named(rows, name)
        assert op.verdict == "note" and "no C++ compiler" in op.value and "DS_BUILD_ALST=1" in op.remedy
    (disk,) = named(rows, "disk")
    assert " MB/s" in disk.value and [path.name for path in tmp_path.iterdir()] == ["extensions", "ds.json"]
    (refused,) = named(rows, "ds_config")
    assert refused.verdict == "problem" and "does not divide the world size (3 ranks)" in refused.value
    # Nothing else is wrong with the environment that the tests run in.
    problems = {row["name"] for row in rows if row["verdict"] == "problem"}
    assert problems == {"build lock", "ds_config"}, rows
    assert named(rows, "import torch")[0].value == f"loads {ROOT / 'deepspeed_alst'} in a fresh process"
    assert "reads this package's keys" in named(rows, "import deepspeed")[0].value
    assert "for offloaded activations" in named(rows, "host memory")[0].value


def test_with_autoload_off_and_transformers_broken_the_other_rows_are_there(tmp_path):
    broken = broken_module(tmp_path / "broken", "transformers", "of another age")
    status, rows = run_report(folder=tmp_path, first_in_path=broken, DEEPSPEED_ALST_AUTOLOAD="0")
    assert status == 1
    for name in ("autoload", "import torch"):
        (row,) = named(rows, name)
        assert row.verdict == "problem" and "DEEPSPEED_ALST_AUTOLOAD" in row.value + row.remedy
    (modules,) = named(rows, "a run's modules")
    assert modules.verdict == "problem" and "of another age" in modules.value
    assert named(rows, "host memory")[0].verdict in ("ok", "note")


def test_a_torch_that_does_not_load_is_a_row(tmp_path):
    broken = broken_module(tmp_path / "broken", "torch", "libcudart.so.99: cannot open shared object file")
    status, rows = run_report(folder=tmp_path, first_in_path=broken)
    assert status == 1
    (row,) = named(rows, "a fresh process")
    assert row.verdict == "problem" and "libcudart.so.99" in row.value and "at import torch" in row.value
    assert named(rows, "deepspeed")[0].verdict == "ok"


# --- versions


def installed(folder, name, version):
    """A distribution as pip leaves it, ahead of the real one."""
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("name", "version", "verdict", "words"),
    [
        ("torch", "2.6.0", "problem", "barrier"),
        ("torch", "2.7.0+cu126", "problem", "barrier"),
        ("torch", "2.9.1", "problem", "2.9.1, and this package asks for >=2.13.0"),
        ("deepspeed", "0.20.0", "problem", "<0.20"),
        ("liger_kernel", "0.5.0", "note", "0.5.0, and this package asks for"),
        ("transformers", "99.0", "ok", "99.0"),
    ],
)
def test_versions_are_judged_by_what_the_package_asks_for(tmp_path, monkeypatch, name, version, verdict, words):
    installed(tmp_path, name, version)
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = [row for row in packages.rows() if row.name == name.replace("_", "-")]
    assert (row.verdict, words in row.value) == (verdict, True), row
    assert bool(row.remedy) == (verdict != "ok")


def test_what_is_not_installed_says_what_a_run_has_without_it(monkeypatch):
    # No folder of packages, so nothing is installed, this package neither.
    monkeypatch.setattr(sys, "path", [])
    rows = {row.name: row for row in packages.rows()}
    assert rows["liger-kernel"].verdict == "note" and "not installed: no Liger kernels" in rows["liger-kernel"].value
    assert rows["peft"].remedy == "pip install 'peft'"
    for name in ("deepspeed_alst", "entry point", "torch", "deepspeed", "transformers"):
        assert rows[name].verdict == "problem" and rows[name].remedy, name


# --- the host


def test_shared_memory_is_judged_by_what_runs_need():
    assert [host.shared_memory_row(size).verdict for size in (64 << 20, 512 << 20, 16 * GIB)] == [
        "problem",
        "note",
        "ok",
    ]


def test_buffers_that_a_process_maps_are_not_left_over(tmp_path):
    left, used = tmp_path / "deepspeed_allreduce_buffer_0_a_1_0", tmp_path / "deepspeed_allreduce_buffer_0_b_2_0"
    assert host.buffers_row(tmp_path) == Row("shared buffers", "none left over")
    for path in (left, used):
        path.write_bytes(bytes(4096))
    with used.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        row = host.buffers_row(tmp_path)
        assert row.verdict == "note" and str(left) in row.value and str(used) not in row.value
        left.unlink()
        assert host.buffers_row(tmp_path) == Row("shared buffers", "1 in use, none left over")
    assert str(used) in host.buffers_row(tmp_path).value


def test_locked_memory_is_judged_by_the_disk_tiers_buffers():
    assert host.locked_memory_row(resource.RLIM_INFINITY).verdict == "ok"
    assert host.locked_memory_row(64 * GIB).verdict == "ok"
    assert "memlock=-1" in host.locked_memory_row(8 << 20).remedy


# --- GPUs, by what torch and the system say of them (stand-ins: there is none here)


def gpu(name, total_memory, major):
    return SimpleNamespace(name=name, total_memory=total_memory, major=major, minor=0)


def test_gpus_are_counted_by_kind():
    (row,) = gpu_rows([gpu("H100", 80 * GIB, 9)] * 8, "550.54.15")
    assert row == Row("gpus", "8 x H100, 80.0 GiB, compute capability 9.0, driver 550.54.15")
    old, new, mixed = gpu_rows([gpu("V100", 32 * GIB, 7), gpu("H100", 80 * GIB, 9)], "")
    assert [row.verdict for row in (old, new, mixed)] == ["note", "ok", "note"]


@pytest.mark.parametrize(
    ("cuda", "on_gpu", "driver", "verdict"),
    [
        ("12.8", True, "550.54", "ok"),
        ("12.8", False, "470.1", "problem"),
        ("12.8", False, "", "note"),
        (None, False, "550.54", "problem"),
        (None, False, "", "ok"),
    ],
)
def test_a_build_of_torch_that_leaves_the_gpus_alone_is_a_problem(cuda, on_gpu, driver, verdict):
    row = build_row(cuda, None, on_gpu, driver)
    assert row.verdict == verdict and bool(row.remedy) == (verdict == "problem")


def test_the_driver_is_read_from_the_kernels_file(tmp_path):
    assert driver_version(tmp_path / "version") == ""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    assert driver_version(tmp_path / "version") == "570.86.15"


def test_the_allocator_and_flash_attention_are_judged_on_gpus_only():
    assert allocator_row("expandable_segments:False", on_gpu=True).verdict == "note"
    assert allocator_row("expandable_segments:True", on_gpu=True).verdict == "ok"
    assert "alst.expandable_segments" in allocator_row("", on_gpu=True).value
    assert allocator_row("expandable_segments:False", on_gpu=False).verdict == "ok"
    nothing = {2: "", 3: "", 4: ""}
    assert [flash_row(nothing, on_gpu).verdict for on_gpu in (True, False)] == ["note", "ok"]
    assert flash_row({**nothing, 2: "2.8, which does not load (ImportError: undefined symbol)"}, True).verdict == (
        "problem"
    )


# --- a ds_config


@pytest.mark.parametrize(
    ("ds_config", "verdicts", "words"),
    [
        ({"sequence_parallel_size": 2}, ["ok"], "2 ranks share a sequence in 4 replica(s)"),
        ({"sequence_parallel_size": 1, "alst": {}}, ["ok"], "whole sequences"),
        ({"zero_optimization": {"stage": 3}}, ["note"], "asks for nothing"),
        ({"sequence_parallel_size": 3}, ["problem"], "Use one of [1, 2, 4, 8]"),
        ({"alst": {"tiled_mlp": True, "pad_to_multiple_of": 0}}, ["problem"] * 2, "Did you mean 'tiled_mlp_compute'"),
        (
            {"sequence_parallel_size": 3, "prescale_gradients": True, "hybrid_engine": {"enabled": True}},
            ["problem"] * 3,
            "prescale_gradients=true",
        ),
        ([1], ["problem"], "no JSON object"),
        ({"alst": {}, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["problem"], "bf16.enabled is true too"),
        ({"alst": {}, "steps_per_print": 0}, ["problem"], "steps_per_print: must be a whole number"),
        (
            {"activation_checkpoint_cpu_offload": {"nvme_path": "/no/such/folder"}},
            ["problem"],
            "nvme_path: no folder on this host",
        ),
        ({"sp_size": 2}, ["problem"], "Did you mean 'sequence_parallel_size'?"),
        ({"sequence_parallel_size": 2, "data_parallel_size": 4}, ["note"], "asks for nothing"),
    ],
)
def test_a_ds_config_is_checked_for_a_number_of_ranks(tmp_path, ds_config, verdicts, words):
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    rows = [*keys.rows(tmp_path / "ds.json", 8)]
    assert [row.verdict for row in rows] == verdicts and any(words in row.value for row in rows), rows


def test_a_ds_config_that_cannot_be_read_is_a_row(tmp_path):
    (tmp_path / "half.json").write_text('{"alst": ')
    for name in ("half.json", "missing.json"):
        (row,) = keys.rows(tmp_path / name, None)
        assert row.verdict == "problem" and str(tmp_path / name) in row.value


def test_every_ready_ds_config_passes():
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        num_gpus = max(8, json.loads(path.read_text()).get("sequence_parallel_size", 1))
        # Its disk is not on this host.
        rows = [row for row in keys.rows(path, num_gpus) if "nvme_path: no folder on this host" not in row.value]
        assert {row.verdict for row in rows} <= {"ok", "note"}, path


# --- the command line


def test_the_package_is_a_command_with_a_version_and_examples():
    for words, said in (
        (["--version"], "deepspeed_alst 0."),
        (["verify", "--help"], "examples:\n  ds_alst verify --ds"),
    ):
        done = subprocess.run([sys.executable, "-m", "deepspeed_alst", *words], capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout


def test_the_table_shows_values_and_remedies_as_they_are(capsys):
    print_table(
        [Row("ds_config", "Use one of [1, 3].", "problem", "rm [red]/tmp/lock[/red]"), Row("python", "3.11")], ""
    )
    out = capsys.readouterr().out
    assert "Use one of [1, 3]." in out and "-> rm [red]/tmp/lock[/red]" in out and "1 problems, 0 notes, 1 ok" in out


def test_help_loads_nothing_heavy():
    program = (
        "import sys, deepspeed_alst.cli.main as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print([name for name in ('torch', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert "report" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_an_error_of_the_package_is_a_sentence_and_status_2(monkeypatch, capsys):
    def run(arguments):
        raise AlstError("one sentence. A way out.")

    monkeypatch.setattr(report, "run", run)
    assert main.main(["report"]) == 2
    assert capsys.readouterr().err == "ds_alst report: one sentence. A way out.\n"
    with pytest.raises(SystemExit) as ended:
        main.main(["of-another-program"])
    assert ended.value.code == 2
