"""The disk tier's file on real disks: full, read-only, frozen, without O_DIRECT, and under processes that are killed.

What needs a file system of its own mounts one, and is skipped where that is not allowed.
"""

import contextlib
import fcntl
import mmap
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from deepspeed_alst.errors import ConfigError, OffloadError, SetupError
from deepspeed_alst.offload import disk as disk_module
from deepspeed_alst.offload.channels import PAGE_BYTES, SystemCalls
from deepspeed_alst.offload.disk import DiskFile, fingerprint
from deepspeed_alst.offload.free_list import Extents
from deepspeed_alst.offload.transfers import Workers, within

KEY = "alst.activation_checkpoint_cpu_offload.nvme_path"
MIB = 1 << 20
FREEZE, THAW = 0xC0045877, 0xC0045878  # ioctls of a mounted file system


def page_buffer(num_bytes, file=None):
    """Memory at an address that is a multiple of a page; with a file, such that its engine takes it as it is."""
    return file.new_buffer(num_bytes) if file else torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def filled(num_bytes, seed=0, file=None):
    return page_buffer(num_bytes, file).copy_(
        torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    )


@contextlib.contextmanager
def opened(folder, engine="threads", **options):
    file = DiskFile(folder, engine=engine, **options)
    try:
        yield file
    finally:
        file.close()


def need_the_op():
    pytest.importorskip("deepspeed")
    from deepspeed_alst.offload.aio import build_folder

    if not (build_folder() / "built").exists():
        pytest.skip(
            "DeepSpeed's async I/O op is not built here; with libaio-dev, some minutes of "
            "python -c 'from deepspeed_alst.offload.aio import load_aio; load_aio()' build it"
        )


@pytest.fixture(params=["threads", "aio"])
def engine(request):
    if request.param == "aio":
        need_the_op()
    return request.param


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


class StuckChannel:
    """A disk that answers nothing until it is let go."""

    def __init__(self):
        self.go = threading.Event()

    def write(self, buffer, offset):
        self.go.wait()


# --- what goes out comes back


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 1_000_003, 3 * MIB])
def test_what_was_written_is_read_bit_for_bit(tmp_path, engine, num_bytes):
    with opened(tmp_path, engine) as file:
        file.allocate(PAGE_BYTES)  # the offset is not 0
        offset = file.allocate(num_bytes)
        sent = filled(-(-num_bytes // PAGE_BYTES) * PAGE_BYTES, file=file)
        file.write(sent, offset).wait()
        got = page_buffer(sent.numel(), file)
        file.read(got, offset).wait()
        assert torch.equal(got, sent)
        assert file.bytes_written == file.bytes_read == sent.numel()


def test_a_transfer_of_several_pieces_and_an_odd_end(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(disk_module, "_PIECE_BYTES", MIB)
    with opened(tmp_path, engine) as file:
        sent, got = filled(3 * MIB + PAGE_BYTES, file=file), page_buffer(3 * MIB + PAGE_BYTES, file)
        offset = file.allocate(sent.numel())
        file.write(sent, offset).wait()
        file.read(got, offset).wait()
        assert torch.equal(got, sent)


def test_many_transfers_are_under_way_at_once(tmp_path, engine):
    with opened(tmp_path, engine) as file:
        sizes = [PAGE_BYTES * random.Random(i).randint(1, 200) for i in range(60)]
        sent = filled(sum(sizes), file=file).split(sizes)
        offsets = [file.allocate(size) for size in sizes]
        writes = [file.write(buffer, offset) for buffer, offset in zip(sent, offsets, strict=True)]
        got = page_buffer(sum(sizes), file).split(sizes)
        # Nobody waits for the writes: a read of the same place begins after them.
        reads = [file.read(buffer, offset) for buffer, offset in reversed(list(zip(got, offsets, strict=True)))]
        for transfer in writes + reads:
            transfer.wait()
        assert all(transfer.done for transfer in writes + reads)
        assert all(torch.equal(*pair) for pair in zip(sent, got, strict=True))
        assert file.bytes_written == file.bytes_read == sum(sizes)
        assert file.seconds_waited > 0


def test_two_files_in_one_folder_know_nothing_of_each_other(tmp_path, engine):
    with opened(tmp_path, engine) as one, opened(tmp_path, engine) as other:
        sent = [filled(MIB, seed) for seed in (1, 2)]
        for file, buffer in zip((one, other), sent, strict=True):
            assert file.allocate(MIB) == 0
            file.write(buffer, 0).wait()
        for file, buffer in zip((one, other), sent, strict=True):
            got = page_buffer(MIB)
            file.read(got, 0).wait()
            assert torch.equal(got, buffer)
        assert os.listdir(tmp_path) == []


def test_short_writes_and_reads_go_on_at_a_whole_page(tmp_path, monkeypatch):
    calls = []

    def short(call):
        def some(descriptor, buffers, offset):
            calls.append(offset)
            return call(descriptor, [buffers[0][: 2 * PAGE_BYTES]], offset) - (100 if len(buffers[0]) > 8192 else 0)

        return some

    with opened(tmp_path) as file:
        monkeypatch.setattr(os, "pwritev", short(os.pwritev))
        monkeypatch.setattr(os, "preadv", short(os.preadv))
        sent, got = filled(5 * PAGE_BYTES), page_buffer(5 * PAGE_BYTES)
        offset = file.allocate(sent.numel())
        file.write(sent, offset).wait()
        file.read(got, offset).wait()
    assert torch.equal(got, sent)
    assert calls == [0, 4096, 8192, 12288] * 2


# --- space


def test_what_is_given_back_is_used_again(tmp_path):
    with opened(tmp_path) as file:
        offsets = [file.allocate(MIB) for _ in range(4)]
        assert offsets == [0, MIB, 2 * MIB, 3 * MIB] and file.reserved_bytes == 4 * MIB
        sent = filled(MIB)
        file.write(sent, offsets[1]).wait()
        file.free(offsets[1])
        assert file.allocate(MIB) == offsets[1]
        with pytest.raises(OffloadError, match="nothing was written at 1,048,576"):
            file.read(page_buffer(MIB), offsets[1]).wait()
        for offset in offsets:
            file.free(offset)
        assert file.allocate(4 * MIB) == 0, "neighbours join, so that lengths may change from step to step"
        assert file.reserved_bytes == 4 * MIB
        assert file.allocate(1) == 4 * MIB and file.reserved_bytes == 4 * MIB + PAGE_BYTES


def test_space_is_not_given_back_under_a_transfer(tmp_path, monkeypatch):
    write = SystemCalls.write
    monkeypatch.setattr(SystemCalls, "write", lambda *arguments: (time.sleep(0.2), write(*arguments)))
    with opened(tmp_path) as file:
        offset = file.allocate(1)
        transfer = file.write(filled(PAGE_BYTES), offset)
        file.free(offset)
        assert transfer.done


def test_a_disk_that_others_fill_at_the_same_time_is_not_kept_full(small_disk, monkeypatch):
    with opened(small_disk) as file:
        file.reserve(MIB)
        free = os.statvfs(small_disk).f_bfree
        monkeypatch.setattr(file._scratch, "free_bytes", lambda: None)  # what it says is not true any more
        with pytest.raises(ConfigError, match="No space left on device: activations need 66,060,288 bytes more there"):
            file.reserve(64 * MIB)
        assert os.fstat(file._scratch.descriptor).st_size == file.reserved_bytes == MIB
        assert os.statvfs(small_disk).f_bfree > free - 16, "but for a block or two of the file system's own"


def test_parts_never_overlap_and_all_come_back():
    order, extents, taken = random.Random(7), Extents(), {}
    for _ in range(3000):
        if taken and order.random() < 0.5:
            offset = order.choice(list(taken))
            extents.free(offset, taken.pop(offset))
        else:
            size = order.choice([1, 2, 3, 5, 8])
            extents.grow(extents.size_bytes + extents.missing(size))
            assert extents.missing(size) == 0
            taken[extents.take(size)] = size
        cells = [cell for offset, size in taken.items() for cell in range(offset, offset + size)]
        assert len(cells) == len(set(cells)) and max(cells, default=0) < max(1, extents.size_bytes)
    for offset, size in taken.items():
        extents.free(offset, size)
    assert extents.missing(extents.size_bytes) == 0 and extents.take(extents.size_bytes) == 0


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
            ConfigError, match=f"{KEY}=.*No space left.* need 9,437,184 bytes more .* 8,388,608 bytes are"
        ):
            file.reserve(9 * MIB)
        file.reserve(8 * MIB)


def test_a_disk_without_a_mount_of_ours_is_too_small_as_well(tmp_path):
    with opened(tmp_path) as file, pytest.raises(ConfigError, match=r"No space left.*raise host_budget"):
        file.reserve(1 << 50)


def test_a_disk_that_fills_up_in_training_is_an_error_and_what_is_there_stays(mount):
    folder = mount("tmpfs", "size=8m")
    with opened(folder) as file:
        offset, sent = file.allocate(2 * MIB), filled(2 * MIB)
        file.write(sent, offset).wait()
        (folder / "of somebody else").write_bytes(bytes(5 * MIB))
        with pytest.raises(OffloadError, match=r"need 3,145,728 bytes more there, and 1,048,576 bytes are free\. Free"):
            file.allocate(3 * MIB)
        assert file.reserved_bytes == 2 * MIB
        got = page_buffer(2 * MIB)
        file.read(got, offset).wait()
        assert torch.equal(got, sent)
        file.allocate(MIB)


def test_a_file_that_may_not_become_longer_is_left_as_it_was(tmp_path):
    # Free bytes there are: it is fallocate that fails.
    with opened(tmp_path) as file, longest_file(2 * MIB):
        file.allocate(MIB)
        with pytest.raises(OffloadError, match=r"File too large: activations need 2,097,152 bytes more"):
            file.allocate(2 * MIB)
        assert os.fstat(file._scratch.descriptor).st_size == file.reserved_bytes == MIB
        file.allocate(MIB)


# --- folders


@pytest.mark.parametrize("path", ["not mounted", "not mounted/run 7"])
def test_a_folder_that_is_missing_is_not_made_elsewhere(tmp_path, path):
    with pytest.raises(ConfigError) as error:
        DiskFile(tmp_path / path)
    missing = tmp_path / path
    assert str(error.value) == (
        f"{KEY}='{missing}': there is no such folder. Mount its disk, or make it: mkdir -p '{missing}'."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["a file", "a file/below", "/proc/self"])
def test_a_path_that_cannot_be_a_folder_to_write_to_is_named(tmp_path, path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ConfigError) as error:
        DiskFile(tmp_path / path)
    assert str(error.value).startswith(f"{KEY}='{tmp_path / path}': ") and ". Name a folder" in str(error.value)


def test_a_folder_that_cannot_be_written_to_is_named(mount):
    with pytest.raises(ConfigError, match=r"Read-only file system\. Name a folder that this user may write to\."):
        DiskFile(mount("tmpfs", "ro"))


def test_a_full_disk_is_found_by_the_test_write(mount):
    folder = mount("tmpfs", "size=1m")
    (folder / "of somebody else").write_bytes(bytes(MIB))
    with pytest.raises(ConfigError, match=r"a test write failed: No space left on device\. Free space"):
        DiskFile(folder)


def test_a_file_system_without_direct_io_is_written_through_the_cache_and_says_so(mount):
    folder = mount("ramfs")
    with opened(folder, engine="auto") as file:
        assert "buffered: ramfs has no O_DIRECT (Invalid argument)" in file.description
        assert "system calls in threads (ramfs has no O_DIRECT" in file.description
        assert "space cannot be set aside" in file.description
        assert file.warning == f"{folder} is in memory (ramfs): what is offloaded there frees none"
        sent, got = filled(MIB), page_buffer(MIB)
        offset = file.allocate(MIB)
        file.write(sent, offset).wait()
        file.read(got, offset).wait()
        assert torch.equal(got, sent)
    with pytest.raises(SetupError, match="ramfs has no O_DIRECT"):
        DiskFile(folder, engine="aio")


def test_memory_is_no_disk():
    with opened("/dev/shm") as file:
        assert "/dev/shm is in memory (tmpfs)" in file.warning


def test_a_disk_is_used_directly_and_is_no_reason_for_a_warning(tmp_path):
    with opened(tmp_path) as file:
        if file.warning:
            pytest.skip("the folder for tests is in memory")
        assert file.description.endswith("system calls in threads (as asked for), O_DIRECT")


def test_a_name_that_a_crash_has_left_is_removed_at_the_next_start(tmp_path):
    (tmp_path / ".deepspeed-alst-offload-x1y2").write_bytes(b"left")
    (tmp_path / "of somebody else").write_bytes(b"")
    with opened(tmp_path):
        assert os.listdir(tmp_path) == ["of somebody else"]


@pytest.mark.parametrize("nameless", [True, False])
def test_no_other_user_may_read_the_file(nameless, tmp_path, monkeypatch):
    if not nameless:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    before = os.umask(0)
    try:
        with opened(tmp_path) as file:
            assert stat.S_IMODE(os.fstat(file._scratch.descriptor).st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_file_system_without_nameless_files_leaves_no_name_either(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # what is left of the flag where it is not known: EISDIR
    with opened(tmp_path) as file:
        assert os.listdir(tmp_path) == []
        assert os.readlink(f"/proc/self/fd/{file._scratch.descriptor}").startswith(f"{tmp_path}/.deepspeed-alst-off")
        sent, got = filled(MIB), page_buffer(MIB)
        offset = file.allocate(MIB)
        file.write(sent, offset).wait()
        file.read(got, offset).wait()
        assert torch.equal(got, sent)


# --- errors of the disk in training


def test_a_write_that_fails_is_an_error_at_its_wait(tmp_path):
    with opened(tmp_path) as file:
        offsets = [file.allocate(MIB) for _ in range(2)]
        with longest_file(MIB + PAGE_BYTES):  # a short write, and then an error
            transfer = file.write(filled(MIB), offsets[1])
            with pytest.raises(OffloadError, match=r"writing 1,048,576 bytes at 1,048,576: File too large\. Free"):
                transfer.wait()
        assert transfer.done and file.bytes_written == 0
        with pytest.raises(OffloadError, match="nothing was written at 1,048,576, or the write failed"):
            file.read(page_buffer(MIB), offsets[1]).wait()
        file.write(filled(MIB), offsets[1]).wait()  # the thread has survived


def test_a_full_device_and_a_file_that_ends_are_errors():
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        SystemCalls(full.fileno(), direct=True).write(filled(PAGE_BYTES), 0)
    with open("/dev/null", "rb") as empty, pytest.raises(OSError, match="0 of 4096 bytes"):
        SystemCalls(empty.fileno(), direct=True).read(page_buffer(PAGE_BYTES), 0)


def test_a_write_that_fails_without_a_word_is_found_when_it_is_read(tmp_path):
    need_the_op()
    # DeepSpeed's op does not look at the outcome of its requests.
    with opened(tmp_path, "aio") as file:
        offset = file.allocate(2 * MIB)
        with longest_file(MIB):
            file.write(filled(2 * MIB, file=file), offset).wait()
        with pytest.raises(OffloadError, match="2,097,152 bytes at 0 came back different from what was written"):
            file.read(page_buffer(2 * MIB, file), offset).wait()


def test_bytes_that_change_on_the_disk_are_found_when_they_are_read(tmp_path, engine):
    with opened(tmp_path, engine) as file:
        offset = file.allocate(MIB)
        file.write(filled(MIB), offset).wait()
        os.pwritev(file._scratch.descriptor, [filled(PAGE_BYTES, seed=5).numpy()], 17 * PAGE_BYTES)
        with pytest.raises(OffloadError, match="came back different"):
            file.read(page_buffer(MIB), offset).wait()


def test_a_fingerprint_has_words_of_each_page():
    buffer = filled(64 * PAGE_BYTES)
    whole = fingerprint(buffer)
    for page in range(64):
        changed = buffer.clone()
        changed[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = 0
        assert fingerprint(changed) != whole, page


# --- a disk that does not answer


def test_a_disk_that_does_not_answer_is_an_error_that_says_how_long():
    channel = StuckChannel()
    workers = Workers([channel], silence_seconds=0.3)
    stuck = workers.start("writing 4,096 bytes at 0", lambda channel: channel.write(None, 0))
    behind = workers.start("writing 8,192 bytes at 4,096", lambda channel: None)
    begin = time.monotonic()
    with pytest.raises(OffloadError, match=r"^writing 4,096 bytes at 0: the disk has not answered for [0-9]+ s\. Look"):
        stuck.wait()
    with pytest.raises(OffloadError, match="writing 8,192 bytes at 4,096: the disk has not answered"):
        behind.wait(seconds=0.1)
    assert not stuck.done and not behind.done
    assert not workers.close(seconds=0.1)
    assert time.monotonic() - begin < 60
    with pytest.raises(OffloadError, match="closed before"):
        behind.wait()
    with pytest.raises(OffloadError, match="is closed"):
        workers.start("another", lambda channel: None)
    channel.go.set()
    stuck.wait()
    assert workers.close(seconds=60)


def test_a_slow_disk_that_moves_is_no_silent_one():
    workers = Workers([StuckChannel()], silence_seconds=2.0)
    transfers = [workers.start("writing", lambda channel: time.sleep(0.4)) for _ in range(6)]
    transfers[-1].wait()
    assert workers.seconds_waited > 2
    assert workers.close(seconds=60)


def test_a_call_that_does_not_return_is_left_behind():
    go = threading.Event()
    with pytest.raises(OffloadError, match=r"^opening: the disk has not answered for 0\.1 s"):
        within(0.1, "opening", go.wait)
    go.set()
    with pytest.raises(TimeoutError, match="of the call itself"):
        within(60, "opening", lambda: (_ for _ in ()).throw(TimeoutError("of the call itself")))


def test_a_frozen_file_system_times_out_and_the_file_closes(small_disk):
    folder = small_disk
    root = os.open(folder, os.O_RDONLY)
    disk = DiskFile(folder, engine="threads", silence_seconds=0.5)
    offset = disk.allocate(MIB)
    fcntl.ioctl(root, FREEZE, 0)
    try:
        transfer = disk.write(filled(MIB), offset)
        with pytest.raises(OffloadError, match=r"writing 1,048,576 bytes at 0: the disk has not answered for [0-9]+ s"):
            transfer.wait()
        with pytest.raises(OffloadError, match=r"the disk has not answered for 0\.5 s"):
            disk.allocate(MIB)
        begin = time.monotonic()
        disk.close(seconds=0.2)
        assert time.monotonic() - begin < 60
    finally:
        fcntl.ioctl(root, THAW, 0)
        os.close(root)
    with pytest.raises(OffloadError, match="the file was closed during this transfer"):
        transfer.wait()
    assert disk._workers.close(seconds=60)
    disk._scratch.close()


# --- the end of a process

PROGRAM = """
import sys, threading
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.transfers import Workers
file = DiskFile(sys.argv[1], engine=sys.argv[2])
offset = file.allocate(4 << 20)
file.write(file.new_buffer(4 << 20), offset).wait()
workers = Workers([None], 120.0)
workers.start("a transfer that never ends", lambda channel: threading.Event().wait())
print("ready", flush=True)
sys.stdin.readline()
buffer = file.new_buffer(1 << 20)
for _ in range(200):  # not waited for
    file.write(buffer, file.allocate(1 << 20))
del buffer
"""


def start_program(folder, engine):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), engine],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = iter(process.stdout.readline, "")  # DeepSpeed's warnings come first
    assert "ready\n" in lines, process.communicate()
    return process


def test_a_killed_process_leaves_neither_a_file_nor_used_space(mount):
    folder = mount("tmpfs", "size=8m")
    process = start_program(folder, "threads")
    assert os.listdir(folder) == []
    assert os.statvfs(folder).f_bfree * PAGE_BYTES == 4 * MIB
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=100)
    assert os.statvfs(folder).f_bfree == os.statvfs(folder).f_blocks and os.listdir(folder) == []


def test_a_process_ends_though_a_transfer_never_does_and_nothing_was_closed(tmp_path, engine):
    process = start_program(tmp_path, engine)
    _, errors = process.communicate("end\n", timeout=100)  # its workers would wait for 120 s
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert os.listdir(tmp_path) == []


def test_close_twice_and_nothing_after_it(tmp_path, engine):
    file = DiskFile(tmp_path, engine=engine)
    offset = file.allocate(1)
    descriptor = file._scratch.descriptor
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(OffloadError, match="the file is closed"):
        file.write(filled(PAGE_BYTES), offset)


# --- which engine


def test_the_op_is_taken_where_it_is_and_says_so(tmp_path):
    need_the_op()
    with opened(tmp_path, "auto") as file:
        assert file.engine == "aio"
        assert file.description.endswith(
            "DeepSpeed's async I/O op (buffers that are not pinned: system calls), O_DIRECT"
        )


def test_without_libaio_threads_do_it_and_say_why(tmp_path, monkeypatch):
    builders = pytest.importorskip("deepspeed.ops.op_builder")
    from deepspeed_alst.offload.aio import load_aio

    load_aio.cache_clear()
    monkeypatch.setattr(builders.AsyncIOBuilder, "has_function", lambda *_, **__: False)
    with opened(tmp_path, "auto") as file:
        assert file.engine == "threads"
        assert "system calls in threads (libaio is missing here; install libaio-dev" in file.description
    with pytest.raises(SetupError, match=r"libaio is missing here\. install libaio-dev"):
        DiskFile(tmp_path, engine="aio")


def test_no_queues_left_in_the_kernel_is_found_before_the_op_would_end_the_process(tmp_path, monkeypatch):
    need_the_op()
    from deepspeed_alst.offload import aio

    used = aio._num_queues()
    with opened(tmp_path, "aio", num_threads=3):
        assert aio._num_queues() == used + 6
    assert aio._num_queues() == used, "closing ends the op's threads and queues"
    monkeypatch.setattr(aio, "_num_queues", lambda: used)
    with opened(tmp_path, "auto") as file:
        assert "the kernel has no queues left for it; raise fs.aio-max-nr" in file.description


def test_the_op_takes_pinned_buffers_and_system_calls_the_others(tmp_path, monkeypatch):
    need_the_op()
    from deepspeed_alst.offload import aio

    class Asked(SystemCalls):
        num_bytes = 0

        def write(self, buffer, offset):
            self.num_bytes += buffer.numel()

    with open(tmp_path / "file", "w+b") as file:
        system_calls = Asked(file.fileno(), direct=False)
        (channel,) = aio.open_aio_channels(file.fileno(), [system_calls])
        channel.write(aio.locked_buffer(MIB).fill_(7), 0)
        assert system_calls.num_bytes == 0 and (tmp_path / "file").read_bytes() == b"\7" * MIB
        channel.write(filled(MIB), 0)
        assert system_calls.num_bytes == MIB
    monkeypatch.setattr(aio, "_may_lock", lambda num_bytes: False)
    with opened(tmp_path, "aio") as disk:  # else the op would end the process
        assert aio.locked_buffer(MIB) is None and disk.new_buffer(1).numel() == PAGE_BYTES


def test_as_much_memory_may_be_locked_as_the_system_says(monkeypatch):
    pytest.importorskip("deepspeed")
    from deepspeed_alst.offload import aio

    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    monkeypatch.setattr(aio, "_CAP_IPC_LOCK", 0)  # as if it were no privileged process
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE_BYTES << 3, before[1]))
    try:
        status = Path("/proc/self/status").read_text().split()
        locked_bytes = 1024 * int(status[status.index("VmLck:") + 1])
        assert aio._may_lock((PAGE_BYTES << 3) - locked_bytes) or locked_bytes > PAGE_BYTES << 3
        assert not aio._may_lock((PAGE_BYTES << 3) + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
