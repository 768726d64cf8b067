"""``ds_alst report`` in real environments: as it is, with torch or transformers broken, with what builds leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepspeed_alst.cli import main, probe, report
from deepspeed_alst.cli.report import Row
from deepspeed_alst.errors import AlstError

ROOT = Path(__file__).parents[2]
GIB = 2**30


def run_report(*words, folder, first_in_path=None, **variables):
    """The command in a process of its own; its exit status, and its rows by name."""
    path = os.pathsep.join([*([str(first_in_path)] if first_in_path else []), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed_alst", "report", "--json", *words],
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
    (stale,) = named(rows, "build lock")  # and not the one that a build holds
    assert stale.verdict == "problem" and str(left) in stale.value and f"rm {left}" in stale.remedy
    (op,) = named(rows, "op alst_ops")
    assert op.verdict == "note" and "no C++ compiler" in op.value and "DS_BUILD_ALST=1" in op.remedy
    (disk,) = named(rows, "disk")
    assert " MB/s" in disk.value and [path.name for path in tmp_path.iterdir()] == ["extensions", "ds.json"]
    (refused,) = named(rows, "ds_config")
    assert refused.verdict == "problem" and "does not divide the world size (3 ranks)" in refused.value
    # Nothing else is wrong with the environment that the tests run in.
    problems = {row["name"] for row in rows if row["verdict"] == "problem"}
    assert problems == {"build lock", "ds_config"}, rows
    assert named(rows, "autoload")[0].value == f"on: `import torch` loads {ROOT / 'deepspeed_alst'}"
    assert "for offloaded activations" in named(rows, "host memory")[0].value


def test_with_autoload_off_and_transformers_broken_the_other_rows_are_there(tmp_path):
    broken = broken_module(tmp_path / "broken", "transformers", "of another age")
    status, rows = run_report(folder=tmp_path, first_in_path=broken, DEEPSPEED_ALST_AUTOLOAD="0")
    assert status == 1
    (row,) = named(rows, "autoload")
    assert row.verdict == "problem" and "DEEPSPEED_ALST_AUTOLOAD=0" in row.value and "unset" in row.remedy
    (modules,) = named(rows, "import deepspeed_alst.initialize")
    assert modules.verdict == "problem" and "of another age" in modules.value
    assert named(rows, "host memory")[0].verdict in ("ok", "note")


def test_a_torch_that_does_not_load_is_a_row(tmp_path):
    broken = broken_module(tmp_path / "broken", "torch", "libcudart.so.99: cannot open shared object file")
    status, rows = run_report(folder=tmp_path, first_in_path=broken)
    assert status == 1
    (row,) = named(rows, "a new process")
    assert row.verdict == "problem" and "libcudart.so.99" in row.value and "at import torch" in row.value
    assert named(rows, "deepspeed")[0].verdict == "ok"


def test_a_torch_that_hangs_is_a_row(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(report, "_PROGRAM", report._PROGRAM.replace("120", "1"))
    (row,) = report._probe("")
    assert row.verdict == "problem" and "at import torch" in row.value and "Timeout (0:00:01)" in row.value


# --- versions


def installed(folder, name, version):
    """A distribution as pip leaves it, ahead of the real one."""
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("name", "version", "verdict", "words"),
    [
        ("torch", "2.7.0+cu126", "problem", "unsupported version"),
        ("torch", "2.9.1", "problem", "2.9.1 (needs >=2.13.0); unsupported version"),
        ("deepspeed", "0.20.0", "problem", "<0.20"),
        ("liger_kernel", "0.5.0", "note", "0.5.0 (needs"),
        ("transformers", "99.0", "ok", "99.0"),
    ],
)
def test_versions_are_judged_by_what_the_package_asks_for(tmp_path, monkeypatch, name, version, verdict, words):
    installed(tmp_path, name, version)
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = [row for row in report.version_rows() if row.name == name.replace("_", "-")]
    assert (row.verdict, words in row.value) == (verdict, True), row
    assert bool(row.remedy) == (verdict != "ok")


def test_what_is_not_installed_says_what_a_run_has_without_it(monkeypatch):
    # No folder of packages, so nothing is installed, this package neither.
    monkeypatch.setattr(sys, "path", [])
    rows = {row.name: row for row in report.version_rows()}
    assert rows["liger-kernel"].verdict == "note" and "not installed; optional" in rows["liger-kernel"].value
    assert rows["peft"].remedy == "pip install 'peft'"
    for name in ("deepspeed-alst", "torch", "deepspeed", "transformers"):
        assert rows[name].verdict == "problem" and rows[name].remedy, name


# --- GPUs, by what torch says of them (stand-ins: there is none here)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Give torch these GPUs, DeepSpeed a device, and the system a driver."""

    def give(*gpus, device="cuda", driver=False):
        cards = [SimpleNamespace(name=name, total_memory=80 * GIB, major=9, minor=0) for name in gpus]
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))
        monkeypatch.setattr("torch.cuda.is_available", lambda: bool(cards))
        monkeypatch.setattr("torch.cuda.get_device_properties", cards.__getitem__)
        monkeypatch.setattr(probe, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
        monkeypatch.setattr(probe, "_DRIVER", tmp_path if driver else tmp_path / "missing")

    return give


def test_gpus_are_counted_by_kind_and_unused_ones_are_told(machine):
    machine(*["H100"] * 7, "H200")
    (row,) = probe.gpu_rows()
    assert row.verdict == "ok" and "7 x H100, 80.0 GiB, capability 9.0; 1 x H200" in row.value
    machine("H100", device="cpu")
    (row,) = probe.gpu_rows()
    assert (row.verdict, row.remedy) == ("note", "unset DS_ACCELERATOR")
    machine(device="cpu", driver=True)
    (row,) = probe.gpu_rows()
    assert row.verdict == "problem" and "CUDA_VISIBLE_DEVICES" in row.remedy
    machine(device="cpu")
    assert [row.verdict for row in probe.gpu_rows()] == ["ok"]


def test_an_attention_kernel_that_does_not_load_is_a_problem(monkeypatch, tmp_path):
    installed(tmp_path, "flash_attn", "2.8")
    broken_module(tmp_path, "flash_attn", "undefined symbol")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("deepspeed_alst.initialize", "liger_kernel.ops"):  # no other library is to see this flash-attn
        monkeypatch.delitem(probe._MODULES, module)
    rows = {row.name: row for row in probe.import_rows()}
    assert rows["import flash_attn"].verdict == "problem" and "undefined symbol" in rows["import flash_attn"].value
    assert rows["import flash_attn.cute"] == Row("import flash_attn.cute", "not installed")
    assert rows["import triton"] == Row("import triton", "loads")


def test_a_library_newer_than_tested_is_a_note(monkeypatch):
    monkeypatch.setattr("deepspeed_alst.environment.NEWEST_TESTED", {"torch": "2.0"})
    (row,) = probe.tested_rows()
    assert row.verdict == "note" and "newest tested: 2.0" in row.value


# --- a ds_config


@pytest.mark.parametrize(
    ("ds_config", "verdicts", "words"),
    [
        ({"sequence_parallel_size": 2}, ["ok"], "2 ranks per sequence, 4 replica(s)"),
        ({"sequence_parallel_size": 1, "alst": {}}, ["ok"], "sequence parallelism is off"),
        ({"alst": {"tiled_mlp_compute": True}}, ["ok"] * 2, '{"tile_tokens": null, "tile_bytes": "auto", '),
        ({"zero_optimization": {"stage": 3}}, ["note"], "has no key of this package"),
        ({"sequence_parallel_size": 3}, ["problem"], "Use one of [1, 2, 4, 8]"),
        ({"alst": {"tiled_mlp": True, "pad_to_multiple_of": 0}}, ["problem"] * 2, "Did you mean 'tiled_mlp_compute'"),
        (
            {"sequence_parallel_size": 3, "prescale_gradients": True, "hybrid_engine": {"enabled": True}},
            ["problem"] * 3,
            "prescale_gradients=true",
        ),
        (
            {"activation_checkpoint_cpu_offload": {"nvme_path": "/no/such/folder"}},
            ["ok", "ok", "problem"],
            "this host has no such folder",
        ),
        ({"sp_size": 2}, ["problem"], "Did you mean 'sequence_parallel_size'?"),
        ({"sequence_parallel_size": 2, "data_parallel_size": 4}, ["note"], "has no key of this package"),
    ],
)
def test_a_ds_config_is_checked_for_a_number_of_ranks(tmp_path, ds_config, verdicts, words):
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    rows = [*report.config_rows(str(tmp_path / "ds.json"), 8)]
    assert [row.verdict for row in rows] == verdicts and any(words in row.value for row in rows), rows


@pytest.mark.parametrize(
    ("content", "words"), [('{"alst": ', ""), ("[1]", "not a JSON object"), (None, "cannot be read")]
)
def test_a_ds_config_that_cannot_be_read_is_a_row(tmp_path, content, words):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    (row,) = report.guarded("ds_config", report.config_rows(str(path), None))
    assert row.verdict == "problem" and str(path) in row.value and words in row.value and "Give the path" in row.value


def test_every_ready_ds_config_passes():
    for path in sorted(each for each in (ROOT / "ds_configs").glob("*.json") if each.suffixes == [".json"]):
        num_gpus = max(8, json.loads(path.read_text()).get("sequence_parallel_size", 1))
        wrong = [row.value for row in report.config_rows(str(path), num_gpus) if row.verdict == "problem"]
        # Its disk is not on this host.
        assert all("nvme_path=" in value and "this host has no such folder" in value for value in wrong), path


# --- the command line


def test_the_package_is_a_command_with_a_version_and_examples():
    for words, said in (
        (["--version"], "deepspeed_alst 0."),
        (["verify", "--help"], "examples:\n  ds_alst verify --ds"),
    ):
        done = subprocess.run([sys.executable, "-m", "deepspeed_alst", *words], capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout


def test_the_lines_have_values_and_remedies_as_they_are_and_name_ds_report(monkeypatch, capsys):
    rows = [Row("ds_config", "Use one of [1, 3].", "problem", "rm [red]/tmp/lock[/red]"), Row("python", "3.11")]
    monkeypatch.setattr(report, "version_rows", lambda: rows)
    monkeypatch.setattr(report, "_probe", lambda nvme_path: [])
    assert main.main(["report"]) == 1
    out = capsys.readouterr().out
    assert "Use one of [1, 3]." in out and "-> rm [red]/tmp/lock[/red]" in out and "1 problems, 0 notes, 1 ok" in out
    assert out.splitlines()[-1].endswith("ds_report")


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
