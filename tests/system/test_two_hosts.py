"""Training over two network namespaces, and what is said where none can be made."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.two_hosts"]


def run(*before: str, **environment: str) -> subprocess.CompletedProcess:
    command = [*before, *COMMAND]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_a_machine_without_the_tools_is_told_so():
    done = run(PATH="")
    assert done.returncode == 1
    assert done.stdout == "MISSED not run: unshare, nsenter, ip, mount, hostname not found (util-linux, iproute2)\n"


@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare", "nsenter", "ip", "mount", "hostname"))),
    reason="takes the right to make namespaces from root",
)
def test_a_machine_that_allows_no_namespaces_is_told_so():
    done = run("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    assert done.returncode == 1
    assert done.stdout.startswith("MISSED not run: this machine allows no namespaces: unshare --net")
    assert "Operation not permitted" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="this machine allows no namespaces",
)
def test_two_hosts_train_as_one_does():
    done = run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(" ok ") == 22 and "ok     0 network links left behind" in done.stdout
