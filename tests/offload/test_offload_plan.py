"""What waits, what room there is, and what is kept: decided from integers, alike on all ranks."""

from dataclasses import replace
from pathlib import Path

import pytest

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.kernels.bf16_codec import packed_bytes
from deepspeed_alst.offload.budget import LayerSizes, MemoryBudget, describe_output, make_plan, max_tokens
from deepspeed_alst.offload.host_buffers import pages

GIB = 2**30
# Llama-3.1-8B: hidden 4096, 32 layers, 32 heads of 128, 218.1M parameters a layer.
LLAMA_8B = LayerSizes(
    num_layers=32,
    keep_last=0,
    input_bytes=8192,
    output_bytes=8192,
    lse_bytes=128,
    matrix_elements=218_103_808,
    head_elements=4096,
)
# Its copies would take longer than what a layer computes.
SLOW = replace(LLAMA_8B, matrix_elements=0, head_elements=0)


def test_bytes_a_token_are_those_of_the_arithmetic():
    tokens = 2**20
    assert LLAMA_8B.offloaded_bytes(tokens, 0) == 262_144 * tokens
    assert LLAMA_8B.offloaded_bytes(tokens, 32) == 32 * (2 * 8192 + 128) * tokens
    assert LLAMA_8B.offloaded_bytes(1, 0) == 32 * pages(8192)


def test_a_node_of_1900_gb_has_room_for_seven_million_tokens_and_half_with_outputs():
    # PEERS' figures: 7.2M tokens of inputs, 3.6M with outputs.
    room = MemoryBudget(1_900 * 10**9)
    assert max_tokens(LLAMA_8B, room, 0) / 1e6 == pytest.approx(7.2, abs=0.1)
    assert max_tokens(LLAMA_8B, room, 32) / 1e6 == pytest.approx(3.6, abs=0.1)
    assert max_tokens(replace(LLAMA_8B, packing="lossless"), room, 0) / 1e6 == pytest.approx(10.0, abs=0.05)


@pytest.mark.parametrize("room", [0, 1, 5000, 8192 * 32, 10**9 + 7])
def test_the_longest_fits_and_one_token_more_does_not(room):
    for num_saved in (0, 9, 32):
        most = max_tokens(LLAMA_8B, MemoryBudget(room), num_saved)
        assert most == 0 or LLAMA_8B.offloaded_bytes(most, num_saved) <= room
        assert LLAMA_8B.offloaded_bytes(most + 1, num_saved) > room


def test_all_layers_kept_on_the_device_need_nothing():
    layers = LayerSizes(2, 5, 8192, 8192, 128, 1, 1)
    assert layers.offloaded_bytes(1000, 32) == 0
    assert make_plan(layers, 1000, MemoryBudget(0), "auto").host_bytes == 0


def test_copies_hide_from_the_lengths_on_that_the_rates_give():
    # 600 TFLOPS, 25 GB/s: a layer of Llama-3.1-8B hides its copies at any length.
    assert LLAMA_8B.copy_is_hidden(0)
    # Of Llama-3.2-1B, 60.8M parameters a layer, from where 2 x 60.8M + 2 x 2048 S reaches 24,000 x 8,320 FLOPs.
    small = replace(LLAMA_8B, input_bytes=4096, output_bytes=4096, matrix_elements=60_817_408, head_elements=2048)
    assert not small.copy_is_hidden(19_053) and small.copy_is_hidden(19_054)


@pytest.mark.parametrize("packing", [False, "lossless"])
@pytest.mark.parametrize("keep_last", [0, 1, 3, 32])
def test_auto_saves_the_output_of_as_many_layers_as_the_host_has_room_for(keep_last, packing):
    layers, tokens = replace(LLAMA_8B, keep_last=keep_last, packing=packing), 100_001
    inputs, outputs = layers.tensor_bytes(tokens, 0), sum(layers.tensor_bytes(tokens, 1)[1:])
    offloaded = 32 - keep_last
    overflow = offloaded * (sum(replace(layers, packing=False).tensor_bytes(tokens, 0)) - sum(inputs))
    assert (overflow > 0) == bool(packing and offloaded)
    for count in {0, 1, offloaded - 1, offloaded} & set(range(offloaded + 1)):
        needed = offloaded * sum(inputs) + count * outputs
        # All inputs fit unpacked beside the outputs.
        rooms = [MemoryBudget(needed + overflow + more, 2**60) for more in (0, outputs - 1)]
        plans = [make_plan(layers, tokens, room, "auto") for room in rooms]
        # Layers that stay on the device save theirs if all others do.
        saved = 32 if count == offloaded else count
        assert [plan.num_saved for plan in plans] == [saved, saved]
        assert {(plan.host_bytes, plan.disk_bytes) for plan in plans} == {(needed, 0)}
        assert ("host's memory" in plans[0].reason, "fits" in plans[0].reason) == (saved < 32, saved == 32)
        assert layers.offloaded_bytes(tokens, saved) == needed
    # It never shortens what fits, and none is saved where inputs are on disk.
    if offloaded:
        assert make_plan(layers, tokens, MemoryBudget(offloaded * sum(inputs) - 1, 2**60), "auto").num_saved == 0
    slow = make_plan(replace(layers, matrix_elements=0, head_elements=0), tokens, MemoryBudget(2**60), "auto")
    assert slow.num_saved == 0 and "longer than a layer's forward" in slow.reason


def test_outputs_of_chunks_are_counted_where_the_layers_that_save_may_be_in_chunks():
    mixed = replace(LLAMA_8B, input_bytes=100, output_bytes=300, num_lean_layers=5, chunk_tokens=10, num_norms=1)
    of_input, of_chunk = pages(100 * 25), 3 * pages(1)
    outputs, of_chunks = pages(300 * 25) + pages(128 * 25), 3 * 2 * pages(1)
    inputs = 27 * of_input + 6 * of_chunk
    assert mixed.offloaded_bytes(25, 0) == inputs
    assert mixed.offloaded_bytes(25, 4) == inputs + 4 * of_chunks
    assert mixed.offloaded_bytes(25, 9) == inputs + 5 * of_chunks + 4 * outputs


def test_where_outputs_are_saved_is_said():
    words = [describe_output(count, 32) for count in (0, 1, 31, 32)]
    assert words == ["recomputed", "saved in the first 1 of 32 layers", "saved in the first 31 of 32 layers", "saved"]


def test_what_is_asked_for_is_kept_hidden_or_not_and_goes_to_disk():
    tokens = 100_000
    both = LLAMA_8B.offloaded_bytes(tokens, 32)
    largest = max(LLAMA_8B.tensor_bytes(tokens, 32))
    plan = make_plan(SLOW, tokens, MemoryBudget(8 * GIB, both), True)
    # Staging buffers are part of the host's room; one tensor more than bytes would say may have to go to disk.
    assert (plan.num_saved, plan.staging_bytes, plan.host_bytes) == (32, 4 * largest, 8 * GIB - 4 * largest)
    assert plan.disk_bytes == both - plan.host_bytes + largest
    small = make_plan(SLOW, tokens, MemoryBudget(1, both), True)
    assert (small.staging_bytes, small.host_bytes, small.disk_bytes) == (1, 0, both)
    assert make_plan(LLAMA_8B, tokens, MemoryBudget(both), False).num_saved == 0


def test_too_much_is_an_error_with_the_longest_sequence_and_the_ways_out():
    # 8 ranks share a sequence and a host of 1.9 TB.
    room = MemoryBudget(1_900 * 10**9 // 8)
    with pytest.raises(OffloadError) as caught:
        make_plan(LLAMA_8B, 1_000_000, room, "auto", shard=(8, 1))
    words = str(caught.value)
    assert "a sequence of 8,000,000 tokens need 244.14 GiB" in words and "available: 221.19 GiB" in words
    assert "nvme_path" in words
    most = max_tokens(LLAMA_8B, room, 0)
    assert f"sequences of at most {8 * most:,} tokens" in words
    assert make_plan(LLAMA_8B, most, room, "auto", shard=(8, 1)).host_bytes <= room.host_bytes

    with pytest.raises(OffloadError, match=r"GiB on disk.*a larger disk, save_attention_output: false, or"):
        make_plan(LLAMA_8B, 1_000_000, MemoryBudget(GIB, GIB), True)


def test_the_users_budget_is_named_where_it_is_what_binds():
    with pytest.raises(OffloadError) as caught:
        make_plan(LLAMA_8B, 100, MemoryBudget(5, host_budget=10), "auto")
    assert str(caught.value).endswith(
        "available: 5.00 bytes (host_budget=10 for all ranks of a host). Use a larger host_budget, or the disk "
        "tier (alst.activation_checkpoint_cpu_offload.nvme_path)."
    )
    with pytest.raises(OffloadError, match=r"host_budget=4294967296.*Use a larger host_budget, the.*, or sequences of"):
        make_plan(LLAMA_8B, 1_000_000, MemoryBudget(GIB, host_budget=4 * GIB), "auto")
    with pytest.raises(OffloadError) as caught:
        make_plan(LLAMA_8B, 1_000_000, MemoryBudget(GIB), "auto")
    assert "host_budget" not in str(caught.value)


def test_the_page_has_the_figures_that_are_printed():
    page = (Path(__file__).parents[2] / "docs" / "offload.md").read_text()
    assert f"{format_bytes(replace(LLAMA_8B, keep_last=1).offloaded_bytes(131_072, 32))} on the host of a rank" in page
    some = make_plan(replace(LLAMA_8B, keep_last=1), 5_000_000, MemoryBudget(1_900 * 10**9), "auto")
    assert f"{describe_output(some.num_saved, 32)} ({some.reason})" in page.replace("\n", " ")
    assert f"5 million with those of {some.num_saved} layers" in page
    with pytest.raises(OffloadError) as caught:
        make_plan(LLAMA_8B, 1_000_000, MemoryBudget(1_900 * 10**9 // 8), "auto", shard=(8, 1))
    assert str(caught.value) in " ".join(page.split())


def test_two_sequences_of_a_batch_share_the_room():
    with pytest.raises(OffloadError, match=r"sequence of 4,000 tokens.*at most 2,048 tokens"):
        make_plan(LLAMA_8B, 4000, MemoryBudget(32 * 8192 * 2048), "auto", shard=(2, 2))


def test_packed_sizes_are_at_most_117_of_160_and_the_log_sum_exp_stays():
    tokens = 100_001
    packed = replace(LLAMA_8B, packing="lossless")
    of_input = pages(packed_bytes(4096 * tokens))
    assert packed.tensor_bytes(tokens, 32) == [of_input, of_input, pages(128 * tokens)]
    assert packed.offloaded_bytes(tokens, 0) == 32 * of_input <= 11.7 / 16 * LLAMA_8B.offloaded_bytes(tokens, 0)
    # Of a token or a chunk that packing makes no smaller.
    assert packed.offloaded_bytes(1, 0) == 32 * pages(packed_bytes(4096))
    assert replace(packed, input_bytes=64).tensor_bytes(64, 0) == [pages(64 * 64)]
    lean = replace(packed, num_lean_layers=32, chunk_tokens=3000, num_norms=1)
    assert lean.offloaded_bytes(7000, 0) == 33 * (
        2 * pages(packed_bytes(4096 * 3000)) + pages(packed_bytes(4096 * 1000))
    )


def test_auto_packs_where_the_host_has_too_little_room_otherwise():
    tokens, auto = 100_000, replace(LLAMA_8B, packing="auto")
    packed = replace(LLAMA_8B, packing="lossless")
    for saves in (False, True):
        needed = LLAMA_8B.offloaded_bytes(tokens, 32 * saves)
        ample, short = (make_plan(auto, tokens, MemoryBudget(room), saves) for room in (needed, needed - 1))
        assert (ample.layers.packing, ample.host_bytes) == (False, needed)
        assert (short.layers.packing, short.host_bytes) == ("lossless", packed.offloaded_bytes(tokens, 32 * saves))
    # Attention's output is worth more than what packing costs, but takes no room that inputs may overflow into.
    room = packed.offloaded_bytes(tokens, 32) + LLAMA_8B.offloaded_bytes(tokens, 0) - packed.offloaded_bytes(tokens, 0)
    assert make_plan(auto, tokens, MemoryBudget(room), "auto").num_saved == 32
    assert make_plan(LLAMA_8B, tokens, MemoryBudget(room), "auto").num_saved < 32
    some = make_plan(auto, tokens, MemoryBudget(room - 1), "auto")
    assert (some.num_saved, some.layers.packing) == (31, "lossless")
    ample = make_plan(auto, tokens, MemoryBudget(LLAMA_8B.offloaded_bytes(tokens, 32)), "auto")
    assert (ample.num_saved, ample.layers.packing) == (32, False)
    assert make_plan(auto, tokens, MemoryBudget(0, 2 * room), False).layers.packing == "lossless"
    assert make_plan(packed, tokens, MemoryBudget(2**60), False).layers.packing == "lossless"
    with pytest.raises(OffloadError) as caught:
        make_plan(auto, tokens, MemoryBudget(room // 8), False)
    assert f"at most {max_tokens(packed, MemoryBudget(room // 8), 0):,} tokens" in str(caught.value)
