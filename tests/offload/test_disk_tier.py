"""The disk tier's file on real disks: full, read-only, frozen, without O_DIRECT, and under processes that are killed.

What needs a file system of its own mounts one, and is skipped where that is not allowed.
"""

import contextlib
import fcntl
import mmap
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from deepspeed_alst.errors import ConfigError, OffloadError
from deepspeed_alst.offload import disk as disk_module
from deepspeed_alst.offload.disk import DiskFile, DiskThreads, checksum
from deepspeed_alst.offload.host_buffers import PAGE

KEY = "alst.activation_checkpoint_cpu_offload.nvme_path"
MIB = 1 << 20
FREEZE, THAW = 0xC0045877, 0xC0045878  # ioctls of a mounted file system


def page_buffer(num_bytes):
    """Memory at an address that is a multiple of a page."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def filled(num_bytes, seed=0):
    return page_buffer(num_bytes).copy_(
        torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    )


@contextlib.contextmanager
def opened(folder):
    file = DiskFile(folder)
    try:
        yield file
    finally:
        file.close()


@pytest.fixture
def mount(tmp_path):
    """Mounts a file system of some kind; all are gone after the test."""
    folders = []

    def mounted(kind, options="", device="none"):
        folder = tmp_path / f"mount-{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", kind, *(["-o", options] if options else []), str(device), str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"{kind} cannot be mounted here")
        folders.append(folder)
        return folder

    yield mounted
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(mount, tmp_path):
    """An ext4 of 16 MiB."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    if shutil.which("mkfs.ext4") is None or subprocess.run(["mkfs.ext4", "-q", image], capture_output=True).returncode:
        pytest.skip("no mkfs.ext4 here")
    return mount("ext4", "loop", image)


@contextlib.contextmanager
def longest_file(num_bytes):
    """The kernel refuses writes beyond this offset, with EFBIG; Python ignores its signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- what goes out comes back


def write(file, buffer, offset):
    """The write under way; its result is the checksum."""
    return file.threads.submit(lambda: file.write(buffer, offset))


def read(file, buffer, offset, writing):
    """The read under way, after the write."""
    return file.threads.submit(lambda: file.read(buffer, offset, writing.result()))


def check_round_trip(file, num_bytes=MIB):
    sent, got = filled(num_bytes), page_buffer(num_bytes)
    offset = file.allocate(num_bytes)
    file.threads.wait(read(file, got, offset, write(file, sent, offset)))
    assert torch.equal(got, sent)


@pytest.mark.parametrize("num_pages", [1, 2, 245, 768])
def test_what_was_written_is_read_bit_for_bit(tmp_path, num_pages):
    with opened(tmp_path) as file:
        file.allocate(PAGE)  # the offset is not 0
        check_round_trip(file, num_pages * PAGE)


def test_a_transfer_of_several_pieces_and_an_odd_end(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_module, "_PIECE_BYTES", MIB)
    with opened(tmp_path) as file:
        check_round_trip(file, 3 * MIB + PAGE)


def test_many_transfers_are_under_way_at_once(tmp_path):
    with opened(tmp_path) as file:
        sizes = [PAGE * random.Random(i).randint(1, 200) for i in range(60)]
        sent, got = filled(sum(sizes)).split(sizes), page_buffer(sum(sizes)).split(sizes)
        offsets = [file.allocate(size) for size in sizes]
        writes = [write(file, buffer, offset) for buffer, offset in zip(sent, offsets, strict=True)]
        # Nobody waits for the writes: a read of the same place begins after them.
        reads = [read(file, *each) for each in reversed(list(zip(got, offsets, writes, strict=True)))]
        for transfer in reads:
            file.threads.wait(transfer)
        assert all(torch.equal(*pair) for pair in zip(sent, got, strict=True))


def test_two_files_in_one_folder_know_nothing_of_each_other(tmp_path):
    with opened(tmp_path) as one, opened(tmp_path) as other:
        sent, got = [filled(MIB, seed) for seed in (1, 2)], [page_buffer(MIB) for _ in range(2)]
        assert one.allocate(MIB) == other.allocate(MIB) == 0
        writes = [write(file, buffer, 0) for file, buffer in zip((one, other), sent, strict=True)]
        for file, buffer, writing in zip((one, other), got, writes, strict=True):
            file.threads.wait(read(file, buffer, 0, writing))
        assert all(torch.equal(*pair) for pair in zip(sent, got, strict=True))
        assert os.listdir(tmp_path) == []


def test_short_writes_and_reads_go_on_at_a_whole_page(tmp_path, monkeypatch):
    calls = []

    def short(call):
        def some(descriptor, buffers, offset):
            calls.append(offset)
            return call(descriptor, [buffers[0][: 2 * PAGE]], offset) - (100 if len(buffers[0]) > 2 * PAGE else 0)

        return some

    with opened(tmp_path) as file:
        monkeypatch.setattr(os, "pwritev", short(os.pwritev))
        monkeypatch.setattr(os, "preadv", short(os.preadv))
        check_round_trip(file, 5 * PAGE)
    assert calls == [page * PAGE for page in range(4)] * 2


# --- space


def test_what_is_given_back_is_used_again(tmp_path):
    with opened(tmp_path) as file:
        offsets = [file.allocate(MIB) for _ in range(4)]
        assert offsets == [0, MIB, 2 * MIB, 3 * MIB] and file.reserved_bytes == 4 * MIB
        file.free(offsets[1], MIB)
        assert file.allocate(MIB) == offsets[1]
        for offset in offsets:
            file.free(offset, MIB)
        assert file.allocate(4 * MIB) == 0, "an empty file has no slots, so that lengths may change from step to step"
        assert file.reserved_bytes == 4 * MIB
        assert file.allocate(PAGE) == 4 * MIB and file.reserved_bytes == 4 * MIB + PAGE


def test_a_disk_that_others_fill_at_the_same_time_is_not_kept_full(small_disk, monkeypatch):
    with opened(small_disk) as file:
        file.reserve(MIB)
        free = os.statvfs(small_disk).f_bfree
        monkeypatch.setattr(DiskFile, "free_bytes", 2**63 - 1)  # what it says is not true any more
        with pytest.raises(OffloadError, match=r"need 66,060,288 more bytes, .*: No space left on device\."):
            file.reserve(64 * MIB)
        assert os.fstat(file._descriptor).st_size == file.reserved_bytes == MIB
        assert os.statvfs(small_disk).f_bfree > free - 16, "but for a block or two of the file system's own"


def test_space_is_set_aside_on_the_disk_and_given_back_at_close(mount):
    folder = mount("tmpfs", "size=8m")
    with opened(folder) as file:
        file.reserve(6 * MIB)
        file.reserve(1 * MIB)
        state = os.statvfs(folder)
        assert state.f_bavail * state.f_frsize == 2 * MIB and file.reserved_bytes == 6 * MIB
    state = os.statvfs(folder)
    assert state.f_bavail == state.f_blocks


def test_more_than_the_disk_has_is_an_error_before_training(mount):
    with opened(mount("tmpfs", "size=8m")) as file:
        with pytest.raises(
            OffloadError, match=f"{KEY}=.* need 9,437,184 more bytes.* 8,388,608 bytes are free: No space left"
        ):
            file.reserve(9 * MIB)
        file.reserve(8 * MIB)


def test_a_disk_without_a_mount_of_ours_is_too_small_as_well(tmp_path):
    with opened(tmp_path) as file, pytest.raises(OffloadError, match=r"No space left.*raise host_budget"):
        file.reserve(1 << 50)


def test_a_disk_that_fills_up_in_training_is_an_error_and_what_is_there_stays(mount):
    folder = mount("tmpfs", "size=8m")
    with opened(folder) as file:
        sent, got = filled(2 * MIB), page_buffer(2 * MIB)
        writing = write(file, sent, file.allocate(2 * MIB))
        (folder / "of somebody else").write_bytes(bytes(5 * MIB))
        words = r"need 3,145,728 more bytes, and 1,048,576 bytes are free: No space left on device\. Use a folder"
        with pytest.raises(OffloadError, match=words):
            file.allocate(3 * MIB)
        assert file.reserved_bytes == 2 * MIB
        file.threads.wait(read(file, got, 0, writing))
        assert torch.equal(got, sent)
        file.allocate(MIB)


def test_a_file_that_may_not_become_longer_is_left_as_it_was(tmp_path):
    # Free bytes there are: it is fallocate that fails.
    with opened(tmp_path) as file, longest_file(2 * MIB):
        file.allocate(MIB)
        with pytest.raises(OffloadError, match=r"need 2,097,152 more bytes.*: File too large\."):
            file.allocate(2 * MIB)
        assert os.fstat(file._descriptor).st_size == file.reserved_bytes == MIB
        file.allocate(MIB)


# --- folders


@pytest.mark.parametrize("path", ["not mounted", "not mounted/run 7"])
def test_a_folder_that_is_missing_is_not_made_elsewhere(tmp_path, path):
    with pytest.raises(ConfigError) as error:
        DiskFile(tmp_path / path)
    missing = tmp_path / path
    assert str(error.value) == f"{KEY}='{missing}': no such folder. Mount its disk, or run mkdir -p '{missing}'."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["a file", "a file/below", "/proc/self"])
def test_a_path_that_cannot_be_a_folder_to_write_to_is_named(tmp_path, path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ConfigError) as error:
        DiskFile(tmp_path / path)
    assert str(error.value).startswith(f"{KEY}='{tmp_path / path}': ") and ". Use a folder" in str(error.value)


def test_a_folder_that_cannot_be_written_to_is_named(mount):
    with pytest.raises(ConfigError, match=r"Read-only file system\. Use a folder that this user may write to"):
        DiskFile(mount("tmpfs", "ro"))


def test_a_full_disk_is_found_by_the_test_write(mount):
    folder = mount("tmpfs", "size=1m")
    (folder / "of somebody else").write_bytes(bytes(MIB))
    with pytest.raises(ConfigError, match=r"a test write failed: No space left on device\. Use a folder"):
        DiskFile(folder)


def test_a_file_system_without_direct_io_is_written_through_the_cache_and_says_so(mount):
    folder = mount("ramfs")
    with opened(folder) as file:
        words = "in memory, so that none is freed: ramfs, buffered: O_DIRECT is not supported; space cannot be reserved"
        assert file.description.startswith(f"{folder} ({words}")
        check_round_trip(file)


def test_memory_is_no_disk():
    with opened("/dev/shm") as file:
        assert "/dev/shm (in memory, so that none is freed: tmpfs" in file.description


def test_a_disk_is_used_directly_and_is_no_reason_for_a_warning(tmp_path):
    with opened(tmp_path) as file:
        if "in memory" in file.description:
            pytest.skip("the folder for tests is in memory")
        assert re.fullmatch(rf"{re.escape(str(tmp_path))} \(\w+, O_DIRECT\)", file.description)


def test_no_other_user_may_read_the_file(tmp_path):
    before = os.umask(0)
    try:
        with opened(tmp_path) as file:
            assert stat.S_IMODE(os.fstat(file._descriptor).st_mode) == 0o600
    finally:
        os.umask(before)


# --- errors of the disk in training


def test_a_write_that_fails_is_an_error_at_its_wait(tmp_path):
    with opened(tmp_path) as file:
        offset = [file.allocate(MIB) for _ in range(2)][1]
        with longest_file(MIB + PAGE):  # a short write, and then an error
            writing = write(file, filled(MIB), offset)
            reading = read(file, page_buffer(MIB), offset, writing)
            for transfer in (writing, reading):
                with pytest.raises(OffloadError, match=r"writing 1,048,576 bytes at 1,048,576: File too large\. Use"):
                    file.threads.wait(transfer)
        check_round_trip(file)  # the threads have survived


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    with opened(tmp_path) as file:
        writing = write(file, filled(MIB), file.allocate(MIB))
        file.threads.wait(writing)
        os.ftruncate(file._descriptor, MIB - PAGE)
        with pytest.raises(OffloadError, match=r"reading 1,048,576 bytes at 0: the disk transferred 0 of 4096 bytes"):
            file.threads.wait(read(file, page_buffer(MIB), 0, writing))


def test_bytes_that_change_on_the_disk_are_found_when_they_are_read(tmp_path):
    with opened(tmp_path) as file:
        writing = write(file, filled(MIB), file.allocate(MIB))
        file.threads.wait(writing)
        os.pwritev(file._descriptor, [filled(PAGE, seed=5).numpy()], 17 * PAGE)
        with pytest.raises(OffloadError, match="1,048,576 bytes at 0 differ from what was written"):
            file.threads.wait(read(file, page_buffer(MIB), 0, writing))


def test_a_checksum_has_words_of_each_page():
    buffer = filled(64 * PAGE)
    whole = checksum(buffer)
    for page in range(64):
        changed = buffer.clone()
        changed[page * PAGE : (page + 1) * PAGE] = 0
        assert checksum(changed) != whole, page


# --- a disk that does not answer


def test_a_disk_that_does_not_answer_is_an_error_that_says_how_long():
    threads, go = DiskThreads("nvme_path='/nvme'", silence_seconds=0.3), threading.Event()

    def stuck():
        threads.progress()
        go.wait()

    transfers = [threads.submit(stuck) for _ in range(4)]
    behind = threads.submit(lambda: None)
    begin = time.monotonic()
    for transfer in (transfers[0], behind):
        with pytest.raises(OffloadError, match=r"^nvme_path='/nvme': the disk has not answered for 0\.3 s\. Use"):
            threads.wait(transfer)
    assert not any(each.done() for each in (*transfers, behind))
    assert not threads.close(seconds=0.1)
    assert time.monotonic() - begin < 60
    with pytest.raises(OffloadError, match=r"after engine\.destroy"):
        threads.submit(lambda: None)
    go.set()
    threads.wait(transfers[0])
    assert threads.close(seconds=60) and behind.done()


def test_a_slow_disk_that_moves_is_no_silent_one():
    threads = DiskThreads("", silence_seconds=2.0)

    def slow():
        for _ in range(6):
            threads.progress()
            time.sleep(0.5)

    threads.wait(threads.submit(slow))
    assert threads.close(seconds=60)


def test_a_device_that_is_late_is_no_silent_disk():
    threads = DiskThreads("", silence_seconds=0.1)
    threads.wait(threads.submit(lambda: time.sleep(1)))  # waits for a copy, in no disk call
    assert threads.close(seconds=60)


def test_a_call_that_fails_raises_its_own_error():
    threads = DiskThreads("", silence_seconds=60)

    def fail():
        raise TimeoutError("of the call itself")

    with pytest.raises(TimeoutError, match="of the call itself"):
        threads.wait(threads.submit(fail))
    assert threads.close(seconds=60)


def test_a_frozen_file_system_times_out_and_the_file_closes(small_disk, monkeypatch):
    monkeypatch.setattr(disk_module, "_CLOSE_SECONDS", 0.2)
    root = os.open(small_disk, os.O_RDONLY)
    disk = DiskFile(small_disk, silence_seconds=0.5)
    offset = disk.allocate(MIB)
    fcntl.ioctl(root, FREEZE, 0)
    try:
        transfer = write(disk, filled(MIB), offset)
        for wait in (lambda: disk.threads.wait(transfer), lambda: disk.allocate(MIB)):
            with pytest.raises(OffloadError, match=rf"^{KEY}='{small_disk}': the disk has not answered for 0\.5 s"):
                wait()
        begin = time.monotonic()
        disk.close()
        assert time.monotonic() - begin < 60
    finally:
        fcntl.ioctl(root, THAW, 0)
        os.close(root)
    assert disk.threads.close(seconds=60)
    os.close(disk._descriptor)


# --- the end of a process

PROGRAM = """
import sys, threading
from deepspeed_alst.offload.disk import DiskFile, DiskThreads
from deepspeed_alst.offload.host_buffers import HostBufferPool
file = DiskFile(sys.argv[1])
buffer, small = HostBufferPool().acquire(4 << 20), HostBufferPool().acquire(1 << 20)
offset = file.allocate(4 << 20)
file.threads.wait(file.threads.submit(lambda: file.write(buffer, offset)))
threads = DiskThreads("", 120.0)
threads.submit(lambda: (threads.progress(), threading.Event().wait()))  # a transfer that never ends
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):  # not waited for
    file.threads.submit(lambda offset=file.allocate(1 << 20): file.write(small, offset))
del buffer, small
"""


def start_program(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = iter(process.stdout.readline, "")  # warnings come first
    assert "ready\n" in lines, process.communicate()
    return process


def test_a_killed_process_leaves_neither_a_file_nor_used_space(mount):
    folder = mount("tmpfs", "size=8m")
    process = start_program(folder)
    assert os.listdir(folder) == []
    assert os.statvfs(folder).f_bfree * PAGE == 4 * MIB
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=100)
    assert os.statvfs(folder).f_bfree == os.statvfs(folder).f_blocks and os.listdir(folder) == []


def test_a_process_ends_though_a_transfer_never_does_and_nothing_was_closed(tmp_path):
    process = start_program(tmp_path)
    _, errors = process.communicate("end\n", timeout=100)  # a wait for its threads would take 120 s
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert os.listdir(tmp_path) == []


def test_close_twice_and_nothing_after_it(tmp_path):
    file = DiskFile(tmp_path)
    file.allocate(PAGE)
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file._descriptor)
    with pytest.raises(OffloadError, match=r"after engine\.destroy\(\) freed them"):
        write(file, filled(PAGE), 0)
