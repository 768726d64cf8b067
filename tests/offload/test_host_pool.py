"""Host memory of exact size, reused, page-locked as it is; what the host has to spare."""

import gc
import inspect

import pytest
import torch

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload import budget
from deepspeed_alst.offload.host_buffers import PAGE, HostBufferPool, pages


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 3 * 2**20 + 5])
def test_a_buffer_has_the_pages_that_it_needs_and_no_more(num_bytes):
    buffer = HostBufferPool().acquire(num_bytes)
    assert buffer.dtype == torch.uint8 and buffer.data_ptr() % PAGE == 0
    assert 0 <= buffer.numel() - num_bytes < PAGE
    buffer.fill_(7)  # all of it can be written


def test_what_is_given_back_is_taken_again():
    pool = HostBufferPool()
    first = pool.acquire(10_000)
    address = first.data_ptr()
    pool.release(first)
    assert pool.acquire(10_001).data_ptr() == address
    assert pool.num_bytes == pool.in_use == pages(10_000)


def test_the_budget_is_the_most_and_idle_buffers_of_other_sizes_make_room():
    pool = HostBufferPool(budget=4 * PAGE)
    small = [pool.acquire(PAGE) for _ in range(4)]
    assert pool.acquire(1) is None
    for each in small:
        pool.release(each)
    assert pool.acquire(3 * PAGE) is not None
    assert pool.num_bytes <= 4 * PAGE
    assert pool.acquire(2 * PAGE) is None


def test_shorter_sequences_use_the_buffers_of_the_longest():
    pool = HostBufferPool()
    pool.set_sizes([1000, 100_000])
    for num_bytes in (100_000, 60_000, 7000, 99_999):
        buffers = [pool.acquire(num_bytes) for _ in range(3)]
        assert pool.num_bytes == 3 * pages(100_000)
        for each in buffers:
            pool.release(each)
    assert pool.acquire(10).numel() == PAGE
    # A longer one has buffers of its own, and the idle ones go.
    pool.set_sizes([1000, 150_000])
    assert pool.num_bytes == PAGE
    assert pool.acquire(150_000).numel() == pages(150_000)
    assert pool.acquire(200_000).numel() == pages(200_000)


def test_a_forked_process_does_not_have_the_buffers():
    buffer = HostBufferPool().acquire(2**20)
    address = f"{buffer.data_ptr():x}-"
    with open("/proc/self/smaps") as file:
        own = file.read().split(address)[1].split("VmFlags:")[1].splitlines()[0]
    assert "dc" in own.split(), "MADV_DONTFORK"


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def test_a_closed_pool_gives_its_memory_back_and_takes_late_buffers():
    pool, size = HostBufferPool(), 64 * 2**20
    late, idle = pool.acquire(size), pool.acquire(size)
    late.fill_(1)
    idle.fill_(1)
    pool.release(idle)
    before = resident()
    pool.close()
    pool.release(late)
    del late, idle
    gc.collect()
    assert pool.num_bytes == 0
    assert before - resident() > 1.9 * size


class Cudart:
    """A stand-in for ``torch.cuda.cudart()``: what CUDA's runtime knows, and the number that it answers with."""

    def __init__(self) -> None:
        self.answer, self.known, self.calls = 0, dict[int, int](), []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        assert address % PAGE == 0 and num_bytes % PAGE == 0
        assert all(address + num_bytes <= start or start + size <= address for start, size in self.known.items())
        self.known[address] = num_bytes
        self.calls.append(("register", address, num_bytes, flags))
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.known[address]
        self.calls.append(("unregister", address))
        return self.answer


@pytest.fixture
def cudart(monkeypatch):
    found = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.calls.append(("wait",)))
    return found


def test_buffers_are_registered_as_long_as_they_are_mapped(cudart):
    pool = HostBufferPool(budget=8 * PAGE, page_locked=True)
    taken = [pool.acquire(3 * PAGE), pool.acquire(5 * PAGE)]
    assert sorted(cudart.known.values()) == [3 * PAGE, 5 * PAGE]
    for each in taken:
        pool.release(each)
    assert pool.acquire(8 * PAGE) is not None and list(cudart.known.values()) == [8 * PAGE]
    pool.close()


def test_cuda_is_given_the_whole_range_and_its_refusal_is_an_error(cudart):
    pool = HostBufferPool(page_locked=True)
    buffer = pool.acquire(5000)
    address = buffer.data_ptr()
    pool.release(buffer)
    pool.close()
    # Nothing is unmapped under a copy.
    assert cudart.calls == [("register", address, 8192, 1), ("wait",), ("unregister", address)]
    cudart.answer = 2
    with pytest.raises(OffloadError, match=r"page-lock.* 8,192 bytes.*error 2"):
        HostBufferPool(page_locked=True).acquire(5000)


def cgroup(folder, version: int, limit: str, usage: int, cache: int):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    limit_name, usage_name, cache_name = names.get(version, ("memory.max", "memory.current", "inactive_file"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{cache_name} {cache}\n")


def test_the_tightest_cgroup_counts_less_its_use_but_for_cache(tmp_path):
    proc = tmp_path / "cgroup"
    proc.write_text("0::/outer/inner\n")
    assert budget.cgroup_available_bytes(proc, tmp_path) == 2**63 - 1
    cgroup(tmp_path / "outer/inner", 2, "max", 10, 0)
    cgroup(tmp_path / "outer", 2, "1000", 600, 100)
    assert budget.cgroup_available_bytes(proc, tmp_path) == 500
    cgroup(tmp_path / "outer/inner", 2, "300", 290, 0)
    assert budget.cgroup_available_bytes(proc, tmp_path) == 10


def test_cgroups_of_version_1_too(tmp_path):
    proc = tmp_path / "cgroup"
    proc.write_text("4:cpu,cpuacct:/job\n3:memory:/job\n")
    cgroup(tmp_path / "memory/job", 1, "2000", 1500, 200)
    assert budget.cgroup_available_bytes(proc, tmp_path) == 700
    # In a container the path is the host's, and the limit is at the root.
    proc.write_text("3:memory:/docker/abc\n")
    cgroup(tmp_path / "memory", 1, "900", 100, 0)
    assert budget.cgroup_available_bytes(proc, tmp_path) == 800


def test_some_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(budget, "cgroup_available_bytes", lambda: 40 * 2**30)
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: type("M", (), {"available": 100 * 2**30}))
    assert budget.available_bytes() == 38 * 2**30
    monkeypatch.setattr(budget, "cgroup_available_bytes", lambda: 2**29)
    assert budget.available_bytes() == 0


def test_the_stand_in_of_cudas_streams_has_its_signatures():
    from tests.stand_ins import streams

    for name in ("wait_event", "wait_stream", "record_event", "synchronize"):
        own = list(inspect.signature(getattr(streams.Stream, name)).parameters)
        assert own == list(inspect.signature(getattr(torch.cuda.Stream, name)).parameters), name
    assert list(inspect.signature(torch.cuda.stream).parameters) == ["stream"]
