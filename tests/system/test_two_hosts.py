"""Training over two hosts, emulated on one machine by two network namespaces and a virtual cable; ``make two-hosts``.

Each host has its own network, host name, /dev/shm and System V memory. A launcher starts ``examples/train.py`` on each,
and the loss curve is compared with that of one host. Linux only; needs root, or unprivileged user namespaces. All
resources live in namespaces of these processes and vanish with them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepspeed_alst.cli.launch import free_port

ROOT = Path(__file__).parents[2]
OWN = ("--net", "--mount", "--uts", "--ipc")
RIGHTS = () if os.geteuid() == 0 else ("--user", "--map-root-user")
# The first process of a PID namespace takes all others with it.
ENTER = ("unshare", *RIGHTS, *OWN, "--pid", "--fork", "--kill-child", "--mount-proc")
WHERE = os.environ.get("TWO_HOSTS", "")
"""Empty for tests that may be skipped, "required", or "inside" for the tests in the namespaces."""
CABLE = "cable0"
STEPS, LENGTH = 4, 2048
LARGEST_DIFFERENCE = 1e-4
SECONDS = 600.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Host:
    """One host; ``enter`` is the command prefix that runs a command there."""

    name: str
    address: str
    enter: tuple[str, ...] = ()

    def run(self, *command: str) -> str:
        """Run a command there and return its output.

        Raises:
            RuntimeError: it fails, with its error output.
        """
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def shared_buffers(self) -> int:
        """Count and remove the host's buffers of DeepSpeed's shared-memory all-reduce."""
        found = [line for line in self.run("ls", "/dev/shm").split() if line.startswith("deepspeed_allreduce_buffer")]
        if found:
            self.run("rm", *(f"/dev/shm/{name}" for name in found))
        return len(found)

    def cable_bytes(self) -> int:
        """Return bytes sent and received at the host's end of the cable."""
        stats = json.loads(self.run("ip", "-j", "-s", "link", "show", CABLE))[0]["stats64"]
        return stats["tx"]["bytes"] + stats["rx"]["bytes"]


def set_up(alpha: Host, beta: Host, pid: int, folder: Path) -> None:
    """Connect the hosts by a cable, and name them; ``pid`` is the process of the second one."""
    alpha.run("ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(pid))
    for host in (alpha, beta):
        host.run("hostname", host.name)
        # As on Debian: by default gloo binds to the address that the host name resolves to.
        names = folder / f"{host.name}.hosts"
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
        host.run("mount", "--bind", str(names), "/etc/hosts")
        host.run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", CABLE)
        for link in ("lo", CABLE):
            host.run("ip", "link", "set", link, "up")


@dataclass(frozen=True)
class Case:
    """Ranks per host, ranks of a sequence, and the launcher."""

    ranks_per_host: int
    sp_size: int
    launcher: str = "no_ssh"
    """DeepSpeed's on each host ("no_ssh"), DeepSpeed's on the first ("pdsh" and .deepspeed_env), torchrun on each."""

    @property
    def name(self) -> str:
        """Short description of the case."""
        where = "on both hosts" if self.sp_size > self.ranks_per_host else "on one host"
        return f"{self.launcher}, {self.ranks_per_host} + {self.ranks_per_host} ranks, SP {self.sp_size} {where}"

    @property
    def least_bytes(self) -> int:
        """Minimum bytes on the cable for q, k, v and outputs: 3 passes, 2 layers.

        It has 4 query heads, 2 KV heads and head dim 32 in fp32; a sequence has at least half of LENGTH tokens. A step
        trains one sequence per rank, and half of each token's heads go to the other host: K and V once.
        """
        if self.ranks_per_host >= self.sp_size:
            return 0
        away_per_token = (2 * 2 + 2 * 1) * 32 * 4
        return 3 * 2 * STEPS * 2 * self.ranks_per_host * (LENGTH // 2) * away_per_token


CASES = (Case(1, 2), Case(2, 2), Case(2, 4), Case(1, 2, "pdsh"), Case(1, 2, "torchrun"))


def train(hosts: tuple[Host, ...], case: Case, folder: Path) -> list[dict]:
    """Run the example on two hosts, or all ranks on one, and return its log lines.

    Raises:
        RuntimeError: a launcher fails or times out, with its output.
    """
    run = Path(tempfile.mkdtemp(dir=folder))
    recipe = json.loads((ROOT / "ds_configs" / "sp2.json").read_text())
    recipe |= {"sequence_parallel_size": case.sp_size, "gradient_accumulation_steps": case.sp_size}
    (run / "ds.json").write_text(json.dumps(recipe))
    program = ["examples/train.py", "--deepspeed", str(run / "ds.json"), "--log-file", str(run / "log")]
    program += ["--steps", str(STEPS), "--seq-len", str(LENGTH)]
    launched = []
    for host, command, environment in _commands(hosts, case, run):
        with (run / f"{host.name}.txt").open("w") as output:
            started = [*host.enter, *command, *program]
            launched.append(subprocess.Popen(started, cwd=ROOT, env=environment, stdout=output, stderr=output))
    try:
        _wait(launched)
    except RuntimeError as error:
        said = "\n".join(f"--- {path.stem}\n{path.read_text()[-3000:]}" for path in run.glob("*.txt"))
        raise RuntimeError(f"{case.name}: {error}\n{said}") from None
    return [json.loads(line) for line in (run / "log").read_text().splitlines()]


def _commands(hosts: tuple[Host, ...], case: Case, run: Path) -> Iterator[tuple[Host, list[str], dict[str, str]]]:
    """Yield hosts with their launch commands and environments."""
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    port, python = str(free_port()), [sys.executable, "-m"]
    deepspeed = [*python, "deepspeed.launcher.runner", "--master_port", port]
    if len(hosts) == 1:
        yield hosts[0], [*deepspeed, "--num_gpus", str(2 * case.ranks_per_host)], os.environ | own
        return
    own["GLOO_SOCKET_IFNAME"] = CABLE
    (run / "hostfile").write_text("".join(f"{host.name} slots={case.ranks_per_host}\n" for host in hosts))
    deepspeed += ["--hostfile", str(run / "hostfile"), "--master_addr", hosts[0].address]
    if case.launcher == "pdsh":
        yield hosts[0], [*deepspeed, "--no_ssh_check"], _for_pdsh(hosts, own, run)
        return
    for node, host in enumerate(hosts):
        command = [*deepspeed, "--no_ssh", "--node_rank", str(node)]
        if case.launcher == "torchrun":
            command = [*python, "torch.distributed.run", "--nnodes", str(len(hosts)), "--node_rank", str(node)]
            command += ["--nproc_per_node", str(case.ranks_per_host)]
            command += ["--master_addr", hosts[0].address, "--master_port", port]
        yield host, command, os.environ | own


def _for_pdsh(hosts: tuple[Host, ...], own: dict[str, str], run: Path) -> dict[str, str]:
    """Return an environment with a fake pdsh in PATH, and a HOME whose .deepspeed_env configures the ranks."""
    (run / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in own.items()))
    enter = {host.name: host.enter for host in hosts}
    stand_in = run / "pdsh"
    stand_in.write_text(f"#!{sys.executable}\nENTER, HOME = {enter!r}, {os.environ.get('HOME', '/')!r}\n{_PDSH}")
    stand_in.chmod(0o755)
    path = f"{run}:{os.environ['PATH']}"
    return os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "HOME": str(run), "PATH": path}


# Emulates pdsh -S -f N -w HOST,... COMMAND over ssh: each host's shell gets the command, with its index for %n, in a
# bare environment; the exit status is the largest.
_PDSH = """
import subprocess, sys
names, command = sys.argv[5].split(","), " ".join(sys.argv[6:])
bare = {"HOME": HOME, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
shells = [
    subprocess.Popen([*ENTER[name], "/bin/sh", "-c", command.replace("%n", str(number))], env=bare)
    for number, name in enumerate(names)
]
sys.exit(max(abs(shell.wait()) for shell in shells))
"""


def _wait(launched: list[subprocess.Popen]) -> None:
    """Wait until all end well; end all if one fails, or after SECONDS."""
    deadline = time.monotonic() + SECONDS
    try:
        while any(process.poll() is None for process in launched):
            if any(process.poll() for process in launched) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        if any(process.poll() != 0 for process in launched):
            raise RuntimeError(f"a launcher failed, or did not end within {SECONDS:.0f} s")
    finally:
        for process in launched:
            process.terminate()
            process.wait()


def lacks_namespaces() -> bool:
    tools = all(map(shutil.which, ("unshare", "nsenter", "ip", "mount", "hostname")))
    return not tools or subprocess.run([*ENTER, "true"], capture_output=True).returncode != 0


@pytest.mark.skipif(WHERE == "inside" or (WHERE != "required" and lacks_namespaces()), reason="needs namespaces")
def test_two_hosts_train_as_one_does():
    """Run the tests below in new namespaces."""
    links = set(os.listdir("/sys/class/net"))
    command = [*ENTER, sys.executable, "-m", "pytest", "-q", "-s", "-m", "slow", str(Path(__file__))]
    assert subprocess.run(command, cwd=ROOT, env=os.environ | {"TWO_HOSTS": "inside"}).returncode == 0
    assert set(os.listdir("/sys/class/net")) == links


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two_hosts")


@pytest.fixture(scope="module")
def hosts(folder):
    # Its line comes from inside the new namespaces.
    command = ["unshare", *OWN, "sh", "-c", "echo && exec sleep infinity"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        alpha = Host("alpha", "10.77.0.1")
        beta = Host("beta", "10.77.0.2", ("nsenter", "--target", str(other.pid), *OWN, f"--wdns={ROOT}"))
        try:
            set_up(alpha, beta, other.pid, folder)
            yield alpha, beta
        finally:
            other.kill()


@pytest.fixture(scope="module")
def alone(hosts, folder):
    """The log lines of a run on one host, by number of ranks."""
    runs = {}
    for case in CASES[:2]:
        ranks = 2 * case.ranks_per_host
        runs[ranks] = train(hosts[:1], Case(case.ranks_per_host, 2), folder)
        buffers = hosts[0].shared_buffers()
        print(f"\n{ranks} ranks on one host: {buffers} buffers of DeepSpeed's shared-memory op (target: {ranks})")
        assert buffers == ranks
    return runs


@pytest.mark.skipif(WHERE != "inside", reason="runs in the namespaces of the test above")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_on_both_hosts_has_the_curve_of_one(case, alone, hosts, folder):
    before = hosts[0].cable_bytes()
    split = train(hosts, case, folder)
    moved, least = hosts[0].cable_bytes() - before, max(1, case.least_bytes)
    buffers = sum(host.shared_buffers() for host in hosts)
    apart = {
        key: max(abs(one[key] - two[key]) for one, two in zip(alone[2 * case.ranks_per_host], split, strict=True))
        for key in ("loss", "grad_norm")
    }
    for key, difference in apart.items():
        last = f"{key} {split[-1][key]:.6f} after {STEPS} steps"
        print(f"{case.name}: {last}, differs by {difference:.1e} at most (target: <= {LARGEST_DIFFERENCE:.0e})")
    print(f"{case.name}: {buffers} buffers of the shared-memory op (target: 0)")
    print(f"{case.name}: {moved / 1e6:.1f} MB on the cable (target: >= {least / 1e6:.1f})", flush=True)
    assert max(apart.values()) <= LARGEST_DIFFERENCE and buffers == 0 and moved >= least
