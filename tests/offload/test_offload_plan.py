"""What waits, what room there is, and what is kept: decided from integers, alike on all ranks."""

from dataclasses import replace
from pathlib import Path

import pytest

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.kernels.bf16_codec import packed_bytes
from deepspeed_alst.offload.budget import LayerSizes, MemoryBudget, make_plan, max_tokens
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
    assert LLAMA_8B.offloaded_bytes(tokens, False) == 262_144 * tokens
    assert LLAMA_8B.offloaded_bytes(tokens, True) == 32 * (2 * 8192 + 128) * tokens
    assert LLAMA_8B.offloaded_bytes(1, False) == 32 * pages(8192)


def test_a_node_of_1900_gb_has_room_for_seven_million_tokens_and_half_with_outputs():
    # PEERS' figures: 7.2M tokens of inputs, 3.6M with outputs.
    room = MemoryBudget(1_900 * 10**9)
    assert max_tokens(LLAMA_8B, room, False) / 1e6 == pytest.approx(7.2, abs=0.1)
    assert max_tokens(LLAMA_8B, room, True) / 1e6 == pytest.approx(3.6, abs=0.1)
    assert max_tokens(replace(LLAMA_8B, packing="lossless"), room, False) / 1e6 == pytest.approx(10.0, abs=0.05)


@pytest.mark.parametrize("room", [0, 1, 5000, 8192 * 32, 10**9 + 7])
def test_the_longest_fits_and_one_token_more_does_not(room):
    for with_outputs in (False, True):
        most = max_tokens(LLAMA_8B, MemoryBudget(room), with_outputs)
        assert most == 0 or LLAMA_8B.offloaded_bytes(most, with_outputs) <= room
        assert LLAMA_8B.offloaded_bytes(most + 1, with_outputs) > room


def test_all_layers_kept_on_the_device_need_nothing():
    layers = LayerSizes(2, 5, 8192, 8192, 128, 1, 1)
    assert layers.offloaded_bytes(1000, True) == 0
    assert make_plan(layers, 1000, MemoryBudget(0), "auto").host_bytes == 0


def test_copies_hide_from_the_lengths_on_that_the_rates_give():
    # 600 TFLOPS, 25 GB/s: a layer of Llama-3.1-8B hides its copies at any length.
    assert LLAMA_8B.copy_is_hidden(0)
    # Of Llama-3.2-1B, 60.8M parameters a layer, from where 2 x 60.8M + 2 x 2048 S reaches 24,000 x 8,320 FLOPs.
    small = replace(LLAMA_8B, input_bytes=4096, output_bytes=4096, matrix_elements=60_817_408, head_elements=2048)
    assert not small.copy_is_hidden(19_053) and small.copy_is_hidden(19_054)


def test_auto_keeps_the_output_where_it_hides_and_fits():
    tokens = 100_000
    both, inputs = LLAMA_8B.offloaded_bytes(tokens, True), LLAMA_8B.offloaded_bytes(tokens, False)
    assert make_plan(LLAMA_8B, tokens, MemoryBudget(both), "auto").saves_attention
    # It never shortens what fits, and it is not kept on disk.
    shorter = make_plan(LLAMA_8B, tokens, MemoryBudget(both - 1), "auto")
    assert not shorter.saves_attention and shorter.host_bytes == inputs and "host's memory" in shorter.reason
    assert not make_plan(LLAMA_8B, tokens, MemoryBudget(both - 1, both), "auto").saves_attention
    slow = make_plan(SLOW, tokens, MemoryBudget(both), "auto")
    assert not slow.saves_attention and "longer than a layer's forward" in slow.reason


def test_what_is_asked_for_is_kept_hidden_or_not_and_goes_to_disk():
    tokens = 100_000
    both = LLAMA_8B.offloaded_bytes(tokens, True)
    largest = max(LLAMA_8B.tensor_bytes(tokens, True))
    plan = make_plan(SLOW, tokens, MemoryBudget(8 * GIB, both), True)
    # Staging buffers are part of the host's room; one tensor more than bytes would say may have to go to disk.
    assert (plan.saves_attention, plan.staging_bytes, plan.host_bytes) == (True, 4 * largest, 8 * GIB - 4 * largest)
    assert plan.disk_bytes == both - plan.host_bytes + largest
    small = make_plan(SLOW, tokens, MemoryBudget(1, both), True)
    assert (small.staging_bytes, small.host_bytes, small.disk_bytes) == (1, 0, both)
    assert not make_plan(LLAMA_8B, tokens, MemoryBudget(both), False).saves_attention


def test_too_much_is_an_error_with_the_longest_sequence_and_the_ways_out():
    # 8 ranks share a sequence and a host of 1.9 TB.
    room = MemoryBudget(1_900 * 10**9 // 8)
    with pytest.raises(OffloadError) as caught:
        make_plan(LLAMA_8B, 1_000_000, room, "auto", shard=(8, 1))
    words = str(caught.value)
    assert "a sequence of 8,000,000 tokens need 244.14 GiB" in words and "available: 221.19 GiB" in words
    assert "nvme_path" in words
    most = max_tokens(LLAMA_8B, room, False)
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
    assert (
        f"{format_bytes(replace(LLAMA_8B, keep_last=1).offloaded_bytes(131_072, True))} on the host of a rank" in page
    )
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
    assert packed.tensor_bytes(tokens, True) == [of_input, of_input, pages(128 * tokens)]
    assert packed.offloaded_bytes(tokens, False) == 32 * of_input <= 11.7 / 16 * LLAMA_8B.offloaded_bytes(tokens, False)
    # Of a token or a chunk that packing makes no smaller.
    assert packed.offloaded_bytes(1, False) == 32 * pages(packed_bytes(4096))
    assert replace(packed, input_bytes=64).tensor_bytes(64, False) == [pages(64 * 64)]
    lean = replace(packed, num_lean_layers=32, chunk_tokens=3000, num_norms=1)
    assert lean.offloaded_bytes(7000, False) == 33 * (
        2 * pages(packed_bytes(4096 * 3000)) + pages(packed_bytes(4096 * 1000))
    )


def test_auto_packs_where_the_host_has_too_little_room_otherwise():
    tokens, auto = 100_000, replace(LLAMA_8B, packing="auto")
    packed = replace(LLAMA_8B, packing="lossless")
    for saves in (False, True):
        needed = LLAMA_8B.offloaded_bytes(tokens, saves)
        ample, short = (make_plan(auto, tokens, MemoryBudget(room), saves) for room in (needed, needed - 1))
        assert (ample.layers.packing, ample.host_bytes) == (False, needed)
        assert (short.layers.packing, short.host_bytes) == ("lossless", packed.offloaded_bytes(tokens, saves))
    # Attention's output is worth more than what packing costs.
    room = packed.offloaded_bytes(tokens, True)
    assert make_plan(auto, tokens, MemoryBudget(room), "auto").saves_attention
    assert not make_plan(LLAMA_8B, tokens, MemoryBudget(room), "auto").saves_attention
    assert make_plan(auto, tokens, MemoryBudget(0, 2 * room), False).layers.packing == "lossless"
    assert make_plan(packed, tokens, MemoryBudget(2**60), False).layers.packing == "lossless"
    with pytest.raises(OffloadError) as caught:
        make_plan(auto, tokens, MemoryBudget(room // 8), False)
    assert f"at most {max_tokens(packed, MemoryBudget(room // 8), False):,} tokens" in str(caught.value)
