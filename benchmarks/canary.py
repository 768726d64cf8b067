"""Test the package with the newest dependencies and with older transformers versions.

    python -m benchmarks.canary [--write] [--only NAME]

Each combination is a separate environment below ``.cache``: a second venv with the newest versions from the registry,
and the current one with another transformers first in the path. Each runs the short parity, the census of ten families,
and the tests that depend on library internals. ``--write`` updates the table in docs/versions.md. The exit status is
non-zero if a combination within setup.py's bounds fails.
"""

import argparse
import datetime
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.figures import Figure, Part, markdown, report

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
LIBRARIES = ("torch", "transformers", "accelerate", "trl", "peft", "liger-kernel", "triton", "deepspeed")
# Additional requirements of the checks.
_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "matplotlib", "ninja")
# The lower bound, and versions required by other frameworks: docs/versions.md.
OLDER_TRANSFORMERS = ("5.23.0", "5.20.2", "5.19.0", "5.16.1")
FAMILIES = "llama qwen3 gemma3_text mixtral qwen3_moe deepseek_v3 gpt_oss qwen3_next mamba2 gpt2"
TESTS = (
    "attention/test_masks attention/test_cores attention/test_kept_attention "
    "checkpoint/test_checkpoints linear_attention/test_linear profiler/test_ledger tiling/test_tiled_mlp "
    "tiling/test_tiled_loss kernels/test_op_build grad_reduction/test_sum_pieces kernels/test_kernels "
    "integrations/test_compile offload/test_offload_engine system/test_plugin system/test_initialize "
    "integrations/test_peft integrations/test_trainer integrations/test_trl"
)
# By name: the module to run, and the pattern of its summary line.
CHECKS = {
    "parity": (("benchmarks.parity", "--short"), r"(?s).* (\d+ of \d+) met"),
    "census": (("benchmarks.census", *FAMILIES.split()), r"(\d+ right)"),
    "tests": (
        ("pytest", "-q", "-m", "not slow", *(f"tests/{name}.py" for name in TESTS.split())),
        r"(\d+ passed.*?) in ",
    ),
}


@dataclass
class Combination:
    """Versions installed together in an environment, and the results of its checks."""

    name: str
    python: Path
    in_front: Path | None = None
    """Folder searched before the environment's own packages."""
    versions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    """Summary by check; starts with "failed" on failure."""

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a Python command in the environment, with this checkout."""
        places = [str(each) for each in (self.in_front, ROOT) if each]
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PATH": path}
        if self.in_front is None:  # ops are built per torch version
            environment["TORCH_EXTENSIONS_DIR"] = str(CACHE / f"extensions-{self.versions.get('torch', '')}")
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run([str(self.python), *words], cwd=ROOT, env=environment, text=True, **streams)


def install_newest() -> Combination:
    """Create a venv with the newest compatible versions, ignoring setup.py's bounds except DeepSpeed's."""
    folder = CACHE / "canary"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--upgrade"]
    wanted = [str(bounds().get(name, name)) if name == "deepspeed" else name for name in LIBRARIES]
    others = [each for each in bounds() if each not in LIBRARIES]
    subprocess.run([*pip, *wanted, *others, *_TOOLS], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
    return Combination("newest", python)


def with_transformers(version: str) -> Combination:
    """Prepend another transformers and its dependencies to this environment."""
    folder = CACHE / f"transformers-{version}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        subprocess.run([*pip, f"transformers=={version}"], check=True)
    return Combination(f"transformers {version}", Path(sys.executable), folder)


def bounds() -> dict[str, Requirement]:
    """Return the package's requirements by distribution."""
    requirements = map(Requirement, importlib.metadata.requires("deepspeed-alst") or ())
    return {each.name: each for each in requirements if "extra" not in str(each.marker)}


def is_inside(versions: dict[str, str]) -> bool:
    """Return True if setup.py's bounds allow these versions."""
    known = (each for each in bounds().values() if each.name in versions)
    return all(each.specifier.contains(versions[each.name], prereleases=True) for each in known)


def check(combination: Combination) -> None:
    """Record the versions and run all checks; stop if the package cannot be imported."""
    code = f"import importlib.metadata as m; print(*map(m.version, {LIBRARIES!r}))"
    found = combination.run("-c", code).stdout.split()[-len(LIBRARIES) :]
    combination.versions = dict(zip(LIBRARIES, found, strict=True))
    imported = combination.run("-W", "ignore", "-c", "import deepspeed_alst.initialize")
    if imported.returncode:
        combination.outcomes = {"import": f"failed: {imported.stdout.strip().splitlines()[-1]}"}
        return
    combination.run("-m", "benchmarks.build_ops")
    for name, (words, pattern) in CHECKS.items():
        done = combination.run("-m", *words)
        found = re.search(pattern, done.stdout)
        said = found[1] if found else next(reversed(done.stdout.strip().splitlines()), "nothing said")
        said = re.sub(rf" ?\(?{re.escape(str(ROOT))}\S*", "", said)  # a path of this machine
        combination.outcomes[name] = f"failed: {said}" if done.returncode else said
        print(f"{combination.name}, {name}: {combination.outcomes[name]}", file=sys.stderr, flush=True)
        if done.returncode:
            print("\n".join(done.stdout.splitlines()[-40:]), file=sys.stderr)


def row(combination: Combination) -> list[str]:
    """Return the combination's table row."""
    outcomes = combination.outcomes
    said = [re.sub(r"\s+", " ", outcomes.get(name, "not run")).replace("|", "/") for name in CHECKS]
    if "import" in outcomes:
        said[0] = re.sub(r"\s+", " ", outcomes["import"].split(" (")[0])
    inside = "yes" if is_inside(combination.versions) else "no"
    day = datetime.date.today().isoformat()
    return [day, *(combination.versions[name] for name in LIBRARIES), inside, *said]


def write(rows: list[list[str]], page: Path) -> None:
    """Insert the rows at the top of the page's table, replacing older rows of the same versions."""
    before, mark, after = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    kept = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in after.splitlines() if line[:3] == "| 2"
    ]
    versions = slice(1, 1 + len(LIBRARIES))
    new = {tuple(each[versions]) for each in rows}
    table = markdown(HEAD, [*rows, *(each for each in kept if tuple(each[versions]) not in new)])
    page.write_text(f"{before}{mark}\n{table}", encoding="utf-8")


HEAD = ["when", *LIBRARIES, "in bounds", *CHECKS]


def figures(names: list[str], writes: bool) -> Iterator[Figure]:
    """Yield a row for each combination; one within the bounds must pass all checks."""
    rows = []
    for name in names:
        combination = install_newest() if name == "newest" else with_transformers(name)
        check(combination)
        rows.append(row(combination))
        inside = is_inside(combination.versions)
        failed = any(each.startswith("failed") for each in combination.outcomes.values())
        yield Figure(combination.name, tuple(rows[-1]), "right" if inside else "", not (inside and failed))
    if writes:
        write(rows, ROOT / "docs" / "versions.md")


def main() -> int:
    """Print the table; return 1 if a combination within the bounds fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/versions.md")
    parser.add_argument("--only", metavar="NAME", help="one combination: newest, or a version of transformers")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else ["newest", *OLDER_TRANSFORMERS]
    return report(__doc__, {"canary": Part(lambda: figures(names, arguments.write), tuple(HEAD))}, ())


if __name__ == "__main__":
    sys.exit(main())
