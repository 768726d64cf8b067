"""Layers in chunks only where shards are long: ``min_tokens`` and ``"auto"``, on live engines over two ranks."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, model_config
from deepspeed_alst import initialize
from deepspeed_alst.memory_lean import core
from deepspeed_alst.verification import verify_model

CHUNKS = {"chunk_tokens": 10, "tile_tokens": 4, "key_block": 7}
SHORT, LONG = 32, 48
HEAD_DIM = 8  # a shard of as many tokens runs on the ordinary path: either dim of its cosines may be its tokens


def engine_of(lean: Any, sp_size: int = 2, checkpoints: bool = True, /, **block: Any) -> tuple[Any, dict[str, str]]:
    """An engine, and the rows of its report."""
    import deepspeed

    model = build_model(model_config(Cell()))
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    keys = {**ds_config(Cell(stage=2), 1), "gradient_accumulation_steps": 1, "sequence_parallel_size": sp_size}
    alst = {"memory_lean_layer": lean, "pad_to_multiple_of": sp_size, **block}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with mock.patch.object(initialize, "print_report") as said:
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config={**keys, "alst": alst})[0]
    return engine, dict(said.call_args.args[0])


def train(lean: Any, short_rows: int = 2) -> dict[str, Any]:
    """A step of short and one of long sequences: what ran in chunks, host bytes, how it was checked, weights."""
    import deepspeed_alst

    make, found = torch.Generator().manual_seed(2), {"attention": [], "in use": [], "checked": []}
    check = verify_model.check_live_model

    def checked(spec: Any, groups: Any, calls: Any, device: Any) -> str:
        found["checked"].append(calls.in_chunks)
        return check(spec, groups, calls, device)

    with (
        mock.patch.object(verify_model, "check_live_model", checked),
        mock.patch.object(core, "add_attention", wraps=core.add_attention) as in_chunks,
    ):
        engine, found["report"] = engine_of(lean, activation_checkpoint_cpu_offload=True, save_attention_output=False)
        for rows, length in ((short_rows, SHORT), (2, LONG)):
            ids = torch.randint(0, 97, (rows, length), generator=make)
            for part in deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine):
                loss = engine(**part).loss
                in_chunks.reset_mock()  # the first forward is the check's too
                found["in use"].append(engine.alst_offload.pool.in_use)
                engine.backward(loss)
                found["attention"].append(in_chunks.call_count > 0)
                engine.step()
    found["weights"] = [param.detach().clone() for param in engine.module.parameters()]
    engine.destroy()
    return found


def test_short_shards_run_as_without_the_key_and_long_ones_in_chunks(ranks2):
    least = LONG // 2
    off, on, some = (ranks2.run(train, each)[0] for each in (False, CHUNKS, CHUNKS | {"min_tokens": least}))
    half = len(on["attention"]) // 2
    assert on["attention"] == [True] * 2 * half and some["attention"] == [False] * half + [True] * half
    assert some["in use"][half:] == on["in use"][half:]
    assert (off["checked"], on["checked"], some["checked"]) == ([True], [True], [False, True])
    assert f"in shards of {least} tokens or more" in some["report"]["memory-lean layer"]
    for expected, found in zip(off["weights"], some["weights"], strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("least", [pytest.param(0, marks=pytest.mark.slow), LONG // 2])
def test_a_chunks_buffers_are_as_large_as_its_tokens_after_more_samples_too(least, ranks2):
    few, many = (ranks2.run(train, CHUNKS | {"min_tokens": least}, rows)[0]["in use"] for rows in (2, 8))
    assert many[len(many) // 2 :] == few[len(few) // 2 :]


def row_of(sp_size: int, checkpoints: bool, offload: bool) -> str:
    engine, report = engine_of("auto", sp_size, checkpoints, activation_checkpoint_cpu_offload=offload)
    engine.destroy()
    return report["memory-lean layer"]


@pytest.mark.parametrize(
    ("sp_size", "checkpoints", "offload", "row"),
    [
        (2, False, False, "off: auto: activations are not checkpointed when the engine is built"),
        (1, True, False, "off: auto: neither sequence parallelism nor the offload is on"),
        (2, True, False, "2 layers in chunks of 8,192 tokens, tiles of 2,048, in shards of 16,385 tokens or more"),
        (1, False, True, "2 layers in chunks of 8,192 tokens, tiles of 2,048, in shards of 16,385 tokens or more"),
    ],
)
def test_auto_is_on_where_activations_are_checkpointed_with_sp_or_the_offload(
    sp_size, checkpoints, offload, row, ranks2
):
    assert ranks2.run(row_of, sp_size, checkpoints, offload)[0] == row


def weights_of_unlike_batches(sp_size: int, lean: Any, short: int) -> list[torch.Tensor]:
    """Weights after steps in which some ranks' batches are long and others short, and one has padding on the left."""
    import deepspeed_alst

    engine, _ = engine_of(lean, sp_size, check_model=False)
    rank, make, batches = dist.get_rank(), torch.Generator().manual_seed(dist.get_rank()), []
    for step in range(2 * sp_size):
        is_long = (step // sp_size + rank // sp_size) % 2 == 0
        ids = torch.randint(0, 97, (1, sp_size * (24 if is_long else short)), generator=make)
        batches.append({"input_ids": ids, "labels": ids})
    if sp_size == 1:
        batches.append({**batches[0], "attention_mask": torch.ones_like(batches[0]["input_ids"])})
        batches[-1]["attention_mask"][0, : 3 * (1 - rank)] = 0
    for batch in batches if sp_size == 1 else deepspeed_alst.shard_dataloader(batches, engine):
        engine.backward(engine(**batch).loss)
        engine.step()
    weights = [param.detach().clone() for param in engine.module.parameters()]
    engine.destroy()
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(("sp_size", "least", "short"), [(1, 20, 12), (2, 20, 12), (1, 0, HEAD_DIM), (2, 0, HEAD_DIM)])
def test_all_ranks_run_a_layer_alike_whatever_their_batches_are(sp_size, least, short, ranks2, ranks4):
    """ZeRO 2 sums the gradients of all ranks in the order of their arrival, which chunks change."""
    ranks, lean = ranks2 if sp_size == 1 else ranks4, CHUNKS | {"min_tokens": least}
    found, expected = (ranks.run(weights_of_unlike_batches, sp_size, each, short) for each in (lean, False))
    for mine, true in zip(found, expected, strict=True):
        for weight, ordinary in zip(mine, true, strict=True):
            assert (weight - ordinary).norm() <= 1e-5 * ordinary.norm()
