"""Metrics of live engines against what the program itself sees, and FLOPs by formula against torch's counter."""

import contextlib
import csv
import io
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from benchmarks.cells import Cell, build_model, ds_config, model_config, samples
from benchmarks.families import family_config
from benchmarks.tally import Tally
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.monitoring.metrics import shard_places, whole_places
from deepspeed_alst.monitoring.step_flops import Span, StepFlops, step_flops
from tests.moe.test_mixtures import SeparateExperts

ODD = Cell(gas=2, odd_lengths=True)
LENGTHS = [[43 + 2 * ((3 * rank + micro) % 5) for micro in range(2)] for rank in range(2)]
"""Of ``ODD``'s samples, by rank."""


def watched_engine(folder: str | None, cell: Cell, sp_size: int, every: int | None, alst: Any = None) -> Any:
    """An engine with the CSV monitor, if there is a folder for it, and a line ``every`` so many steps."""
    import deepspeed

    model = build_model(model_config(cell))
    if cell.checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_config(cell, sp_size) | ({} if alst is None else {"alst": alst})
    del config["steps_per_print"]
    config |= {} if every is None else {"steps_per_print": every}
    if folder is not None:
        config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "run"}
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


def events_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the monitor wrote: step and value, by metric."""
    found = {}
    for path in (folder / "run").glob("alst_*.csv"):
        rows = list(csv.reader(path.open()))[1:]
        found[path.stem.removeprefix("alst_")] = [(int(step), float(value)) for step, value in rows]
    return found


def train(folder: str | None, cell: Cell, sp_size: int, every: int | None = None, alst: Any = None) -> dict[str, Any]:
    """Three steps; what the program sees of each, and what its rank printed."""
    import deepspeed_alst

    engine = watched_engine(folder, cell, sp_size, every, alst)
    seen: dict[str, Any] = {"loss": [], "norm": [], "lr": [], "samples": [], "seconds": [], "keys": set()}
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        for ranks in samples(cell, model_config(cell).vocab_size):
            losses, begin = [], time.perf_counter()
            rate = engine.get_lr()[0]
            for batch in deepspeed_alst.shard_dataloader(ranks[dist.get_rank()], engine):
                seen["keys"] |= set(batch)
                loss = engine(**batch).loss
                engine.backward(loss)
                engine.step()
                losses.append(float(loss.detach()))
            seen["seconds"].append(time.perf_counter() - begin)
            seen["loss"].append(sum(losses) / len(losses))
            seen["norm"].append(float(engine.get_global_grad_norm()))
            seen["lr"].append(rate)
            seen["samples"].append(engine.global_samples)
    measured = engine.alst_features.metrics is not None
    moved = getattr(engine, "alst_offload", None) and engine.alst_offload.counts
    engine.destroy()
    lines = [each for each in printed.getvalue().splitlines() if not each.startswith("deepspeed_alst: model check")]
    return {**seen, "lines": lines, "measured": measured, "moved": moved}


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_events_are_what_the_program_sees(stage, ranks2, tmp_path):
    cell = Cell(stage=stage, gas=2, odd_lengths=True)
    first, second = ranks2.run(train, str(tmp_path), cell, 2)
    events = events_in(tmp_path)
    assert [step for step, _ in events["loss"]] == first["samples"]
    assert [value for _, value in events["loss"]] == pytest.approx(first["loss"], rel=1e-6)
    assert [value for _, value in events["grad_norm"]] == pytest.approx(first["norm"], rel=1e-6)
    assert [value for _, value in events["lr"]] == [0.1, 0.05, 0.025]
    real = sum(map(sum, LENGTHS))
    padded = sum(length + length % 2 for each in LENGTHS for length in each)
    assert padded > real
    assert [value for _, value in events["padding_share"]] == pytest.approx([1 - real / padded] * 3, abs=1e-12)
    # A step ends within the last call of engine.step, and the next begins there: data and lr of the next are in it.
    for (_, speed), seconds in list(zip(events["tokens_per_second"], first["seconds"], strict=True))[1:]:
        assert real / speed == pytest.approx(seconds, rel=0.5)
    assert first["lines"] == second["lines"] == [] and "alst_real_tokens" in first["keys"]


def test_without_sequence_parallelism_losses_are_averaged_over_replicas(ranks2, tmp_path):
    first, second = ranks2.run(train, str(tmp_path), ODD, 1, None, {})
    events = events_in(tmp_path)
    assert first["loss"] != second["loss"]
    mean = [(a + b) / 2 for a, b in zip(first["loss"], second["loss"], strict=True)]
    assert [value for _, value in events["loss"]] == pytest.approx(mean, rel=1e-6)
    assert {value for _, value in events["padding_share"]} == {0.0} and "wire_bytes" not in events


def masked(folder: str, direct: bool) -> None:
    engine = watched_engine(folder, Cell(), 1, None, {})
    batch = {"input_ids": torch.randint(0, 97, (2, 40))}
    batch["attention_mask"] = torch.ones(2, 40, dtype=torch.long)
    batch["attention_mask"][1, 30:] = 0
    loss = engine(**batch, labels=batch["input_ids"]).loss
    if direct:
        loss.backward()
    else:
        engine.backward(loss)
    engine.step()
    engine.destroy()


def test_without_sequence_parallelism_a_direct_backward_has_no_loss(ranks2, tmp_path):
    ranks2.run(masked, str(tmp_path), True)
    events = events_in(tmp_path)
    assert "loss" not in events and "grad_norm" in events


def test_without_sequence_parallelism_padding_is_what_the_mask_says(ranks2, tmp_path):
    ranks2.run(masked, str(tmp_path), False)
    events = events_in(tmp_path)
    assert events["padding_share"][0][1] == pytest.approx(10 / 80)
    flops = step_flops(ModelSpec(build_model(model_config(Cell()))))
    # Of a GPU and of the job: two ranks.
    assert _flops_a_token(events, "model") == pytest.approx([flops.model(70, _pairs([40, 30])) / 70])
    assert _flops_a_token(events, "hardware") == pytest.approx([flops.alst(80, _pairs([40, 40])) / 70])


def _pairs(lengths: list[int]) -> int:
    """Of the cell's two layers."""
    return 2 * sum(length * (length + 1) // 2 for length in lengths)


def _flops_a_token(events: dict[str, list[tuple[int, float]]], kind: str, ranks: int = 2) -> list[float]:
    """A rank's FLOPs by the job's tokens, times ranks: the seconds cancel."""
    flops, tokens = events[f"{kind}_flops_per_second"], events["tokens_per_second"]
    return [ranks * a / b for (_, a), (_, b) in zip(flops, tokens, strict=True)]


@pytest.mark.parametrize("documents", [False, True])
def test_split_sequences_have_the_flops_of_whole_ones(documents, ranks2, tmp_path):
    cell = Cell(odd_lengths=not documents, documents=documents, checkpointing="plain")
    ranks2.run(train, str(tmp_path), cell, 2)
    events = events_in(tmp_path)
    model = build_model(model_config(cell))
    model.activation_checkpointing_enable()
    flops = step_flops(ModelSpec(model))
    lengths = [11, 13, 12, 12, 23, 7, 18] if documents else [43, 49]
    tokens = sum(lengths)
    expected = flops.model(tokens, _pairs(lengths)) / tokens
    assert _flops_a_token(events, "model") == pytest.approx([expected] * 3)
    whole = lengths if documents else [44, 50]
    expected = flops.alst(sum(whole), _pairs(whole)) / tokens
    assert _flops_a_token(events, "hardware") == pytest.approx([expected] * 3)


def test_bytes_on_the_wire_are_those_of_all_to_alls_and_reduction(ranks2, tmp_path):
    cell = Cell(stage=3)
    ranks2.run(train, str(tmp_path), cell, 2)
    numel = sum(param.numel() for param in build_model(model_config(cell)).parameters())
    # Two micro-steps of 24 tokens a rank; forward and backward, 2 layers, 2 query and 1 kv head a rank of 8, fp32.
    expected = 2 * (numel * 4 / 2 + 2 * 2 * 24 * (2 * 2 + 2 * 1) * 8 * 4)
    assert [value for _, value in events_in(tmp_path)["wire_bytes"]] == pytest.approx([expected] * 3)


@pytest.mark.parametrize("disk", [False, True])
def test_bytes_of_the_offload_are_those_that_moved(disk, ranks2, tmp_path):
    block = {"keep_last": 0, "host_budget": 1, "nvme_path": str(tmp_path)} if disk else {"keep_last": 0}
    alst = {"pad_to_multiple_of": 2, "activation_checkpoint_cpu_offload": block, "save_attention_output": False}
    results = ranks2.run(train, str(tmp_path), Cell(gas=2), 2, None, alst)
    events, counts = events_in(tmp_path), [each["moved"] for each in results]
    # Four micro-steps of two layers' inputs: 24 tokens of 32 numbers in fp32. All of it goes to one place.
    assert all(each.bytes_out == 3 * 4 * 2 * 24 * 32 * 4 for each in counts)
    moved = {"offload_disk_bytes": disk, "offload_host_bytes": not disk}
    for name, here in moved.items():
        assert [value for _, value in events[name]] == [counts[0].bytes_out / 3 * here] * 3
    waited = [value for _, value in events["offload_wait_seconds"]]
    assert all(0 <= value < seconds for value, seconds in zip(waited, results[0]["seconds"], strict=True))
    assert any(waited) == disk


def test_a_line_every_steps_per_print_on_rank_0(ranks2):
    first, second = ranks2.run(train, None, ODD, 2, 2)
    (line,) = first["lines"]
    assert second["lines"] == []
    assert line.startswith(f"alst: step 2 | loss {first['loss'][1]:.4f} | norm {first['norm'][1]:.4g} | lr 0.05 | ")
    for part in ("tokens/s, padding 2.1%", " GFLOP/s model (6N, causal half), ", "host | wire "):
        assert part in line
    assert first["measured"]


def test_nothing_is_installed_where_nothing_is_asked_for(ranks2):
    for each in ranks2.run(train, None, ODD, 2):
        assert not each["measured"] and each["lines"] == [] and "alst_real_tokens" not in each["keys"]


class _Reads(TorchDispatchMode):
    """Counts what is read from tensors to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_and_collectives(every: int | None) -> list[tuple[int, int]]:
    """Of each of three steps."""
    import deepspeed_alst

    engine = watched_engine(None, ODD, 2, every)
    found = []
    for ranks in samples(ODD, 97):
        batches = list(deepspeed_alst.shard_dataloader(ranks[dist.get_rank()], engine))
        tally = Tally()
        with _Reads() as reads, tally.installed(), tally.phase("step"):
            for batch in batches:
                engine.backward(engine(**batch).loss)
                engine.step()
        found.append((reads.count, len(tally.launched)))
    engine.destroy()
    return found


def test_between_lines_nothing_is_read_from_the_device_and_nothing_sent(ranks2):
    plain, watched = ranks2.run(reads_and_collectives, None)[0], ranks2.run(reads_and_collectives, 3)[0]
    assert watched[:2] == plain[:2]
    # Real tokens, pairs, and the loss; each rank's numbers in one exchange.
    assert watched[2][0] > plain[2][0] and watched[2][1] == plain[2][1] + 1


def different_configs() -> list[str]:
    return train(None, ODD, 2, every=None if dist.get_rank() else 1)["lines"]


def test_rank_0_decides_for_all(ranks2):
    lines, others = ranks2.run(different_configs)
    assert len(lines) == 3 and others == []


def trainer(folder: str, out: str) -> list[dict[str, float]]:
    """Two steps of the HF Trainer with an evaluation after each; what it logs."""
    from transformers import Trainer, TrainingArguments

    make = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 97, (48,), generator=make)} for _ in range(16)]
    data = [{**each, "labels": each["input_ids"]} for each in data]
    config = ds_config(Cell(), 2) | {key: "auto" for key in _BATCH_KEYS}
    config |= {"gradient_clipping": 1.0, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "run"}
    arguments = TrainingArguments(
        out,
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        deepspeed=config,
    )
    run = Trainer(build_model(model_config(Cell())), arguments, train_dataset=data, eval_dataset=data[:4])
    run.train()
    history = run.state.log_history
    run.model_wrapped.destroy()
    return [each for each in history if "loss" in each]


_BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


def test_in_the_trainer_they_are_what_it_logs(ranks2, tmp_path):
    logged = ranks2.run(trainer, str(tmp_path), str(tmp_path / "out"))[0]
    events = events_in(tmp_path)
    assert [value for _, value in events["loss"]] == pytest.approx([each["loss"] for each in logged], rel=1e-6)
    assert [value for _, value in events["grad_norm"]] == pytest.approx([each["grad_norm"] for each in logged])
    # Evaluations send too, and are no part of a step.
    assert events["wire_bytes"][0][1] == events["wire_bytes"][1][1]
    assert [step for step, _ in events["lr"]] == [8, 16]


def a_programs_own_wrapper() -> tuple[int, bool, bool]:
    import deepspeed_alst

    engine, seen = watched_engine(None, ODD, 2, 1), []
    before = type(engine).step
    inner = engine.step

    def step() -> Any:
        seen.append(1)
        return inner()

    engine.step = step
    for batch in deepspeed_alst.shard_dataloader(samples(ODD, 97)[0][dist.get_rank()], engine):
        engine.backward(engine(**batch).loss)
        engine.step()
        stays = engine.step is step
    engine.destroy()
    return len(seen), stays, engine.step is step and type(engine).step is not before


def test_a_programs_own_wrapper_of_step_stays_in_place(ranks2):
    assert ranks2.run(a_programs_own_wrapper) == [(4, True, True)] * 2


# --- the formulas


@pytest.mark.parametrize("span", [Span(), Span(window=5), Span(chunk=4)])
@pytest.mark.parametrize("length", [1, 4, 5, 17])
def test_pairs_are_those_of_the_mask(span, length):
    i, j = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    mask = j <= i
    if span.window:
        mask &= i - j < span.window
    if span.chunk:
        mask &= i // span.chunk == j // span.chunk
    seen = span.seen(torch.arange(length))
    assert seen.tolist() == mask.sum(1).tolist()
    # A pair both ways, of one layer, and nothing else.
    assert StepFlops(((span, 1),), 0, 0, 1, 0).alst(length, int(seen.sum())) == (mask | mask.T).sum()


@pytest.mark.parametrize("lengths", [[24], [5, 1, 11, 7]])
def test_places_of_shards_are_those_in_whole_documents(lengths):
    bounds = () if len(lengths) == 1 else (0, *itertools.accumulate(lengths))
    shards = [shard_places(torch.ones(1, 6), bounds, rank) for rank in range(4)]
    whole = [place for length in lengths for place in range(length)]
    assert torch.cat(shards, dim=1).tolist() == [whole]


def test_padding_on_the_left_is_seen_by_no_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    real, places, padded = whole_places(torch.ones(2, 5, dtype=torch.bool), {"attention_mask": mask})
    assert (places[real] + 1).tolist() == [1, 2, 3, 1, 2, 3, 4]
    assert padded.tolist() == [[0, 1, 2, 3, 4]] * 2


LLAMA = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}
MODELS = {
    "llama": LlamaConfig(**LLAMA, num_attention_heads=4, num_key_value_heads=2),
    "tied": LlamaConfig(**LLAMA, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True),
    "head size of its own": family_config("qwen3", head_dim=24),
    "mixture": family_config("mixtral", use_cache=False),
    "many experts": family_config("qwen3_moe"),
    "latent attention": family_config(
        "deepseek_v3",
        num_key_value_heads=4,
        head_dim=4,  # as the class has it: that of the rotated part
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
    ),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_formula_is_torchs_count(name, checkpointed):
    config = MODELS[name]
    config._experts_implementation = "eager"
    model = build_model(config, core="eager")
    model.train()
    if checkpointed:
        model.activation_checkpointing_enable()
    B, S = 2, 96
    ids = torch.randint(0, 97, (B, S))
    # A recomputation may stop early, before the layer's last product, which the convention counts.
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model(input_ids=ids, labels=ids).loss.backward()
    flops = step_flops(ModelSpec(model))
    assert flops.spans == ((Span(), config.num_hidden_layers),)
    # eager attention makes the whole square of scores
    pairs = int(flops.pairs(torch.arange(S)).sum())
    assert flops.alst(B * S, B * pairs) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (flops.token_again > 0) == (flops.pair_again > 0) == checkpointed


def test_separate_experts_have_the_flops_of_stacked_ones():
    model = build_model(family_config("mixtral"))
    stacked = step_flops(ModelSpec(model))
    for layer in model.model.layers:
        layer.mlp = SeparateExperts(layer.mlp)
    assert step_flops(ModelSpec(model)) == stacked


def test_frozen_weights_have_no_gradient_of_their_own():
    model = build_model(MODELS["llama"], core="eager")
    for name, param in model.named_parameters():
        # What is below a trained one still needs the gradient of its input.
        param.requires_grad_("q_proj" in name or "embed" in name)
    ids = torch.randint(0, 97, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    flops = step_flops(ModelSpec(model))
    pairs = int(flops.pairs(torch.arange(64)).sum())
    assert flops.alst(64, pairs) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_model_flops_count_what_the_mask_lets_see_once():
    flops = StepFlops(((Span(), 2), (Span(window=3), 1)), token=80, token_again=16, pair=24, pair_again=8)
    pairs = int(flops.pairs(torch.arange(4)).sum())
    assert pairs == 2 * (1 + 2 + 3 + 4) + (1 + 2 + 3 + 3)
    assert flops.model(4, pairs) == 80 * 4 + 24 * 29
    # Both ways: 16 of each whole layer, and of the window's all but the two corners.
    assert flops.alst(4, pairs) == (80 + 16) * 4 + (24 + 8) * (2 * 16 + 14)


@pytest.mark.parametrize(
    ("family", "changed", "expected"),
    [
        ("mistral", {"sliding_window": 7}, ((Span(window=7), 2),)),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            ((Span(), 1), (Span(window=5), 1)),
        ),
        ("llama4_text", {"attention_chunk_size": 10, "no_rope_layers": [1, 0]}, ((Span(chunk=10), 1), (Span(), 1))),
        ("lfm2", {}, ((Span(), 1),)),
        ("mamba2", {}, ()),
    ],
)
def test_what_layers_see_is_the_configs(family, changed, expected):
    assert step_flops(ModelSpec(build_model(family_config(family, **changed)))).spans == expected
