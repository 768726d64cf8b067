"""Tensors that wait on the host and on disk: the same bits back, in time, and nothing kept longer than it must be."""

import gc
import weakref

import pytest
import torch

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import CopyStream, HostBufferPool, pages
from deepspeed_alst.offload.swapper import Swapper
from tests.stand_ins import streams


@pytest.fixture(params=["direct", "streams"])
def lazy(request):
    """Copies as the CPU makes them, and on a stream that is as late as it may be."""
    if request.param == "direct":
        return CopyStream()
    streams.default.queue.clear()
    return CopyStream(streams)


def tensors(count: int, *shape: int, dtype=torch.float32) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=make).to(dtype) for _ in range(count)]


def on_disk(tmp_path, budget: int, copies: CopyStream | None = None) -> ActivationStore:
    return ActivationStore(HostBufferPool(budget=budget), Swapper(DiskFile(tmp_path), copies), copies)


def forward(store: ActivationStore, values: list[list[torch.Tensor]], stay: int = 0) -> list[list]:
    """One group for each list of tensors: what gives them back, and the group."""
    groups = []
    for index, each in enumerate(values):
        group = store.group(stays=index >= len(values) - stay)
        groups.append([*(group.put(tensor.clone(memory_format=torch.preserve_format)) for tensor in each), group])
    return groups


def check_backward(groups, values) -> None:
    for group, each in zip(reversed(groups), reversed(values), strict=True):
        for get, tensor in zip(group[:-1], each, strict=True):
            found = get()
            assert torch.equal(found, tensor) and found.stride() == tensor.stride() and found.dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stay", [0, 1])
def test_the_same_bits_come_back_in_reverse(dtype, stay, lazy):
    store = ActivationStore(HostBufferPool(), copies=lazy)
    values = [tensors(2, 1, 63, 33, dtype=dtype) for _ in range(5)]
    groups = forward(store, values, stay=stay)
    for _ in range(2):  # a graph that is kept is gone through twice
        check_backward(groups, values)
    assert store.counts.bytes_out == (5 - stay) * 2 * 63 * 33 * dtype.itemsize


def test_strides_survive_and_gaps_do_not():
    store = ActivationStore(HostBufferPool())
    group = store.group()
    heads = torch.randn(2, 7, 4, 5).transpose(1, 2)
    sliced = torch.randn(3, 10)[:, ::2]
    get_heads, get_sliced, get_empty = (group.put(each) for each in (heads, sliced, torch.empty(0, 4)))
    store.release_copied()
    assert torch.equal(get_heads(), heads) and get_heads().stride() == heads.stride()
    assert torch.equal(get_sliced(), sliced) and get_sliced().is_contiguous()
    assert get_empty().shape == (0, 4)


def test_the_device_holds_two_groups_at_most_on_the_way_out_and_one_tensor_ahead_on_the_way_back(lazy):
    store, alive, gets = ActivationStore(HostBufferPool(), copies=lazy), [], []
    for _ in range(6):
        group = store.group()
        tensor = torch.randn(100)
        alive.append(weakref.ref(tensor))
        gets.append(group.put(tensor))
        del tensor
        gc.collect()
        assert [ref() is not None for ref in alive[-2:]] == [True] * min(2, len(alive))
        assert all(ref() is None for ref in alive[:-2])
    store.group(stays=True)
    gc.collect()
    assert all(ref() is None for ref in alive), "the last layer's are alone"
    fetched = store.counts.bytes_back
    last = gets.pop()()
    assert store.counts.bytes_back - fetched == 2 * last.nbytes, "this group's and the one before"


def test_buffers_are_the_pools_again_when_nobody_can_ask_any_more(lazy):
    store = ActivationStore(HostBufferPool(), copies=lazy)
    for _ in range(3):  # steps
        groups = forward(store, [tensors(1, 500) for _ in range(4)])
        assert store.pool.in_use == 4 * pages(2000)
        del groups
        gc.collect()
        assert store.pool.in_use == 0
    assert store.pool.num_bytes == 4 * pages(2000)


def test_a_forward_without_a_backward_and_a_step_after_it(lazy):
    store = ActivationStore(HostBufferPool(), copies=lazy)
    values = [tensors(1, 77) for _ in range(4)]
    forward(store, values)  # an exception, say
    gc.collect()
    again = [tensors(1, 77) for _ in range(4)]
    groups = forward(store, again)
    groups.pop()
    again.pop()
    check_backward(groups, again)


def test_memory_of_what_comes_back_unasked_is_free_after_its_copy(lazy):
    store = ActivationStore(HostBufferPool(), copies=lazy)
    groups = forward(store, [tensors(1, 50) for _ in range(3)])
    groups[2][0]()
    assert lazy._stream is None or len(lazy._stream.queue) == 1, "the group before"
    del groups
    gc.collect()
    assert lazy._stream is None or not lazy._stream.queue


def test_a_change_in_place_before_the_copy_has_ended_is_an_error():
    store = ActivationStore(HostBufferPool())
    tensor = torch.ones(10)
    get = store.group().put(tensor)
    tensor.add_(1)
    with pytest.raises(OffloadError, match="changed in place"):
        store.group(), store.group()
    assert get is not None


def test_no_room_is_an_error_that_says_how_much():
    store = ActivationStore(HostBufferPool(budget=pages(4000) * 2))
    group = store.group()
    kept = [group.put(each) for each in tensors(2, 1000)]
    with pytest.raises(OffloadError, match=r"8,192 bytes of activations are.*budget of 8,192.*nvme_path"):
        group.put(torch.ones(1000))
    assert torch.equal(kept[0](), tensors(1, 1000)[0])


@pytest.mark.parametrize("budget", [0, 2 * pages(63 * 33 * 4), 5 * pages(63 * 33 * 4)])
def test_what_the_host_has_no_room_for_goes_to_disk_and_comes_back(budget, lazy, tmp_path):
    size = 63 * 33 * 4
    store = on_disk(tmp_path, budget, lazy)
    for _ in range(3):
        values = [tensors(2, 1, 63, 33) for _ in range(6)]
        groups = forward(store, values, stay=1)
        check_backward(groups, values)
        del groups
        gc.collect()
    to_host = budget // pages(size)
    assert store.counts.bytes_to_disk == 3 * (10 - to_host) * size
    assert store.pool.num_bytes <= budget and store.swapper.staging.num_bytes <= 4 * pages(size)
    store.close()


def test_tensors_of_several_sizes_share_the_ring(lazy, tmp_path):
    store = on_disk(tmp_path, 0, lazy)
    values = [[torch.randn(10_000), torch.randn(17), torch.randn(2500)] for _ in range(8)]
    check_backward(forward(store, values), values)
    store.close()


def test_a_disk_that_fails_is_an_error_of_the_next_call(tmp_path, monkeypatch):
    store = on_disk(tmp_path, 0)

    def broken(*_):
        raise OffloadError("the disk is on fire")

    monkeypatch.setattr(store.swapper.file, "write", broken)
    with pytest.raises(OffloadError, match="on fire"):
        groups = forward(store, [tensors(1, 1000) for _ in range(20)])
        check_backward(groups, [tensors(1, 1000)] * 20)
    store.close()


def test_two_stores_do_not_see_one_another(lazy, tmp_path):
    stores = [on_disk(tmp_path, 0, lazy) for _ in range(2)]
    values = [[tensors(1, 100) for _ in range(3)], [[each * 2 for each in tensors(1, 100)] for _ in range(3)]]
    groups = [forward(store, each) for store, each in zip(stores, values, strict=True)]
    stores[0].close()
    check_backward(groups[1], values[1])
    stores[1].close()


def test_a_disk_without_room_keeps_no_buffer(tmp_path, monkeypatch):
    store = on_disk(tmp_path, 0)
    swapper = store.swapper

    def full(num_bytes: int) -> int:
        raise OffloadError("no room")

    monkeypatch.setattr(swapper.file, "allocate", full)
    for _ in range(6):  # more than the ring has
        with pytest.raises(OffloadError, match="no room"):
            store.group(stays=False).put(torch.ones(1000))
    assert swapper.staging.in_use == 0
    store.close()


def test_small_tensors_that_are_read_ahead_leave_room_for_a_large_one(tmp_path):
    swapper = Swapper(DiskFile(tmp_path))
    large, *small = (torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (2**20, *[2**16] * 80))
    handles = [swapper.swap_out(each)[1] for each in (large, *small)]
    for handle in handles[1:]:
        swapper.read_ahead(handle)
        if handle.reading is not None:
            handle.reading.result()
    target = torch.empty_like(large)
    swapper.swap_in(handles[0], target)
    assert torch.equal(target, large)
    swapper.close()
