"""Offload by keys on live engines: the bits of the run without it, on every ZeRO path, and errors before a step."""

import copy
import functools
import gc
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.cells import Cell, build_model, ds_config, model_config, offload_keys, run_alst
from benchmarks.ranks import RankError
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import ranks_on_host
from deepspeed_alst.errors import ConfigError, OffloadError, UnsupportedModelError
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy, apply_checkpoint_policy
from deepspeed_alst.offload.host_buffers import HostBufferPool
from tests.system.test_initialize import initialize


def check_moved(store: ActivationStore, offload: str) -> None:
    """What waited did wait, where it should: a run without offload has the same bits."""
    counts = store.counts
    assert counts.bytes_out > 0 and (counts.bytes_to_disk > 0) == (offload == "disk")


def compare(cell: Cell, on_model: Callable[[Any], Any] = lambda model: model) -> int:
    """Compare a cell with the same one without offload; returns the bytes that waited."""
    plain = run_alst(replace(cell, offload=""), on_model=on_model)
    stores = []
    offloaded = run_alst(cell, on_model=on_model, on_engine=lambda engine: stores.append(engine.alst_offload))
    check_moved(stores[0], cell.offload)
    assert offloaded.loss == plain.loss and offloaded.norm == plain.norm
    for what in ("grads", "changes"):
        for name, tensor in getattr(plain, what).items():
            assert torch.equal(getattr(offloaded, what)[name], tensor), f"{what} of {name}"
    return stores[0].counts.bytes_out


@pytest.mark.parametrize(
    "cell",
    [
        Cell(stage=0, offload="host", checkpointing="plain", gas=2),
        pytest.param(
            Cell(stage=1, offload="disk", checkpointing="reentrant", odd_lengths=True), marks=pytest.mark.slow
        ),
        pytest.param(
            Cell(stage=2, offload="outputs", checkpointing="plain", dtype="bf16", gas=2), marks=pytest.mark.slow
        ),
        pytest.param(
            Cell(stage=3, offload="outputs", checkpointing="plain", gas=2, odd_lengths=True), marks=pytest.mark.slow
        ),
        Cell(stage=3, offload="outputs", checkpointing="reentrant", dtype="bf16"),
        Cell(stage=3, offload="disk", checkpointing="plain", tiles=True),
        pytest.param(
            Cell(stage=2, offload="outputs", checkpointing="plain", tiles=True, clip=1.0), marks=pytest.mark.slow
        ),
        Cell(stage=2, offload="outputs", checkpointing="plain", lora=True),
        pytest.param(Cell(stage=3, offload="host", checkpointing="plain", lora=True), marks=pytest.mark.slow),
        Cell(stage=1, offload="outputs", checkpointing="plain", frozen="layer 0"),
        pytest.param(
            Cell(stage=3, offload="disk", checkpointing="plain", frozen="all but lm_head"), marks=pytest.mark.slow
        ),
        Cell(stage=2, offload="outputs", checkpointing="plain", frozen="layer 1", kv_heads=1),
    ],
    ids=Cell.name,
)
def test_offload_changes_no_bit(cell, ranks2):
    ranks2.run(compare, cell)


def every_second_layer(model: torch.nn.Module) -> torch.nn.Module:
    model.activation_checkpointing_enable(every_n_layers=2)
    return model.train()


@pytest.mark.slow
def test_of_layers_of_which_every_second_is_checkpointed_only_those_wait(ranks2):
    cell = Cell(stage=3, offload="outputs", gas=2)
    (some, _), (all_of_them, _) = ranks2.run(compare, cell, every_second_layer), ranks2.run(compare, cell)
    assert 2 * some == all_of_them


# Of a token in a layer in fp32: hidden size 32, and 4 heads' log-sum-exp.
_INPUT, _OUTPUT = 32 * 4, 32 * 4 + 4 * 4


def bytes_of_a_cell() -> int:
    stores = []
    run_alst(
        Cell(offload="outputs", checkpointing="plain"), on_engine=lambda engine: stores.append(engine.alst_offload)
    )
    return stores[0].counts.bytes_out


def test_a_shard_of_attentions_output_waits_beside_each_input(ranks2):
    # 3 steps of 2 micro-steps, 24 of 48 tokens on a rank, 2 layers.
    assert ranks2.run(bytes_of_a_cell) == [3 * 2 * 24 * 2 * (_INPUT + _OUTPUT)] * 2


def bytes_without_sp() -> None:
    engine = whole_model(offload_keys("outputs"))
    batch = batches(1)[0]
    engine.backward(engine(**batch).loss)
    exact = 4 * batch["input_ids"].numel() * (_INPUT + _OUTPUT)
    assert engine.alst_offload.counts.bytes_out == engine.alst_offload.counts.bytes_back == exact
    engine.destroy()


def test_attentions_output_waits_without_sequence_parallelism_too(ranks2):
    ranks2.run(bytes_without_sp)


# --- without sequence parallelism


def whole_model(alst: dict[str, Any], checkpointing: str = "", stage: int = 2, **changed: Any) -> Any:
    """An engine at SP 1; four layers, so that some are fetched ahead."""
    import deepspeed

    config = model_config(Cell())
    config.num_hidden_layers = 4
    for name, value in changed.items():
        setattr(config, name, value)
    model = build_model(config)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    keys = {**ds_config(Cell(stage=stage), 1), "gradient_accumulation_steps": 2}
    if alst:
        keys["alst"] = alst
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=keys)[0]


def batches(count: int = 4, length: int = 63) -> list[dict[str, torch.Tensor]]:
    make = torch.Generator().manual_seed(2)
    ids = [torch.randint(0, 97, (2, length + 7 * (index % 3)), generator=make) for index in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def weights_after(alst: dict[str, Any], between: Any = lambda engine: None, **changed: Any) -> list[torch.Tensor]:
    torch.manual_seed(5)  # of dropout
    engine = whole_model(alst, **changed)
    for batch in batches():
        engine.backward(engine(**batch).loss)
        engine.step()
        between(engine)
    weights = [param.detach().clone() for param in engine.module.parameters()]
    if alst:
        check_moved(engine.alst_offload, "disk" if "nvme_path" in alst["activation_checkpoint_cpu_offload"] else "host")
    engine.destroy()
    return weights


def same_without_sp(checkpointing: str, offload: str, stage: int) -> None:
    plain = weights_after({}, checkpointing=checkpointing, stage=stage)
    kept = weights_after(offload_keys(offload), checkpointing=checkpointing, stage=stage)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize(
    ("checkpointing", "offload", "stage"),
    [("plain", "host", 2), ("reentrant", "outputs", 1), ("plain", "outputs", 0), ("reentrant", "disk", 2)],
)
def test_without_sequence_parallelism_too(checkpointing, offload, stage, ranks2):
    ranks2.run(same_without_sp, checkpointing, offload, stage)


def turns_checkpointing_on() -> None:
    engine = whole_model(offload_keys("host"))
    model, layers = engine.module, engine.module.model.layers
    assert model.is_activation_checkpointing
    engine.backward(engine(**batches(1)[0]).loss)
    engine.destroy()
    assert not model.is_activation_checkpointing
    assert not any("alst" in key for layer in layers for key in vars(layer))
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not any(getattr(hook, "__module__", "").startswith("deepspeed_alst") for hook in hooks)


def test_the_key_turns_checkpointing_on_and_destroy_off_again(ranks2):
    ranks2.run(turns_checkpointing_on)


def dropout() -> None:
    changed = {"checkpointing": "plain", "attention_dropout": 0.1}
    plain, kept = (weights_after(alst, **changed) for alst in ({}, offload_keys("host")))
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_dropout_draws_the_same_again(ranks2):
    ranks2.run(dropout)


def other_work_between() -> None:
    """Evaluations, an exception in a forward, and a graph that is kept, between the steps."""

    def between(engine: Any) -> None:
        batch = batches(1)[0]
        engine.module.eval()
        with torch.no_grad():
            engine(**batch)
        engine.module.train()
        last = engine.module.model.layers[-1]
        broken = mock.patch.object(type(last.mlp), "forward", side_effect=RuntimeError("on purpose"))
        with broken, pytest.raises(RuntimeError, match="on purpose"):
            engine(**batch)
        loss = engine.module(**batch).loss
        embedding = engine.module.model.embed_tokens.weight
        once, again = (torch.autograd.grad(loss, embedding, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, again)

    plain, kept = (weights_after(alst, between, checkpointing="plain") for alst in ({}, offload_keys("outputs")))
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_evaluations_exceptions_and_kept_graphs_between_steps_change_nothing(ranks2):
    ranks2.run(other_work_between)


def compiled_layers() -> None:
    def after(alst: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
        torch._dynamo.reset()
        engine = whole_model(alst, "plain")
        for layer in engine.module.model.layers:
            layer.compile(backend="aot_eager")
        for batch in batches(2):
            engine.backward(engine(**batch).loss)
            engine.step()
        weights = [param.detach().clone() for param in engine.module.parameters()]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert not alst or engine.alst_offload.counts.bytes_back > 0
        engine.destroy()
        return weights, graphs

    (plain, _), (kept, graphs) = after({}), after(offload_keys("outputs"))
    assert graphs > 0, "what a layer does is compiled, and not what happens around it"
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.slow
def test_compiled_layers(ranks2):
    ranks2.run(compiled_layers)


def two_engines() -> None:
    first, second = (whole_model(offload_keys(where), "plain") for where in ("host", "disk"))
    lone = whole_model({}, "plain")
    for batch in batches():
        losses = [engine(**batch).loss for engine in (first, second, lone)]
        for engine, loss in zip((second, lone, first), (losses[1], losses[2], losses[0]), strict=True):
            engine.backward(loss)
            engine.step()
    stacks = [[param.detach() for param in engine.module.parameters()] for engine in (first, second, lone)]
    assert all(torch.equal(a, c) and torch.equal(b, c) for a, b, c in zip(*stacks, strict=True))
    check_moved(first.alst_offload, "host")
    check_moved(second.alst_offload, "disk")
    for engine in (first, second, lone):
        engine.destroy()


def test_two_engines_at_once(ranks2):
    ranks2.run(two_engines)


def host_bytes_and_what_stays() -> None:
    engine = whole_model({"activation_checkpoint_cpu_offload": True, "save_attention_output": False})
    batch = batches(1)[0]
    layers, tokens = 4, batch["input_ids"].numel()
    inputs = []
    for layer in engine.module.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    loss = engine(**batch).loss
    store = engine.alst_offload
    exact = (layers - 1) * tokens * 32 * 4
    assert store.counts.bytes_out == exact
    assert exact <= store.pool.in_use < exact + (layers - 1) * 4096
    gc.collect()
    assert [ref() is not None for ref in inputs] == [False, False, False, True], "on the device, but for the last"
    engine.backward(loss)
    assert store.counts.bytes_back == exact
    assert store.pool.in_use == 0
    pool = store.pool
    engine.destroy()
    assert pool.num_bytes == 0


def test_host_bytes_are_exact_and_the_pool_goes_with_the_engine(ranks2):
    ranks2.run(host_bytes_and_what_stays)


def hosts() -> tuple[int, int]:
    together = ranks_on_host(dist.group.WORLD)
    with mock.patch.object(socket, "gethostname", lambda: f"host-{dist.get_rank()}"):
        return together, ranks_on_host(dist.group.WORLD)


def test_a_hosts_ranks_are_those_with_its_name(ranks2):
    assert ranks2.run(hosts) == [(2, 1)] * 2


# --- errors


def too_long(changed: dict[str, Any], sp_size: int) -> None:
    if sp_size > 1:
        engine = initialize({"alst": {"pad_to_multiple_of": 2, **changed}}, Cell())
        import deepspeed_alst

        loader = deepspeed_alst.shard_dataloader(batches(2), engine)
        try:
            for batch in loader:
                engine(**batch)
        finally:
            engine.destroy()
    else:
        engine = whole_model(changed)
        try:
            engine(**batches(1)[0])
        finally:
            engine.destroy()


@pytest.mark.parametrize("sp_size", [1, 2])
def test_no_room_is_an_error_on_all_ranks_before_the_forward(sp_size, ranks2):
    keys = {"activation_checkpoint_cpu_offload": {"host_budget": 40_000, "keep_last": 0}}
    with pytest.raises(RankError) as caught:
        ranks2.run(too_long, keys, sp_size)
    for error in caught.value.errors:
        assert isinstance(error, OffloadError)
        assert "host_budget=40000" in str(error) and "sequences of at most" in str(error)


@pytest.mark.parametrize("sp_size", [1, 2])
def test_a_disk_without_room_is_an_error_before_the_forward(sp_size, ranks2, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        block = {"host_budget": 1, "keep_last": 0, "nvme_path": str(folder)}
        with pytest.raises(RankError) as caught:
            ranks2.run(too_long, {"activation_checkpoint_cpu_offload": block}, sp_size)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    for error in caught.value.errors:
        assert (
            isinstance(error, OffloadError) and "on disk. Use a larger" in str(error) and "a larger disk" in str(error)
        )


def bad_folder(paths: list[str], sp_size: int) -> None:
    alst = {"activation_checkpoint_cpu_offload": {"nvme_path": paths[dist.get_rank()]}}
    engine = whole_model(alst) if sp_size == 1 else initialize({"alst": alst}, Cell())
    engine.destroy()


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize("bad", ["/proc/self", "/nonexistent/x"])
def test_a_folder_that_cannot_be_used_is_an_error_at_the_start(bad, sp_size, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(bad_folder, [bad, bad], sp_size)
    for error in caught.value.errors:
        assert isinstance(error, ConfigError)
        assert f"alst.activation_checkpoint_cpu_offload.nvme_path='{bad}'" in str(error)


def test_a_disk_that_is_missing_on_one_host_stops_the_ranks_of_all(ranks2, tmp_path):
    with pytest.raises(RankError) as caught:
        ranks2.run(bad_folder, [str(tmp_path), str(tmp_path / "not mounted")], 1)
    there, missing = caught.value.errors
    assert isinstance(there, ConfigError) and isinstance(missing, ConfigError)
    assert str(there) == f"rank 1: {missing}" and "no such folder" in str(missing)


def refused_each_time() -> None:
    engine = whole_model({"activation_checkpoint_cpu_offload": {"host_budget": 80_000, "keep_last": 0}})
    for _ in range(2):
        with pytest.raises(OffloadError, match="sequences of at most"):
            engine(**batches(1)[0])
    short = {key: x[:, :2] for key, x in batches(1)[0].items()}
    engine.backward(engine(**short).loss)
    assert 0 < engine.alst_offload.pool.num_bytes <= 40_000
    engine.destroy()


def test_a_batch_without_room_is_refused_each_time_and_a_shorter_one_is_not(ranks2):
    ranks2.run(refused_each_time)


def lengths_vary() -> list[int]:
    engine = whole_model(offload_keys("outputs"), "reentrant")
    sizes = []
    for index in range(6):
        ids = torch.randint(0, 97, (1, 200 - 31 * (index % 5)))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        # The loss is alive here, and a reentrant checkpoint's node with it.
        assert engine.alst_offload.pool.in_use == 0
        sizes.append(engine.alst_offload.pool.num_bytes)
    engine.destroy()
    return sizes


def test_the_pool_is_as_large_as_the_longest_sequence_needs(ranks2):
    for sizes in ranks2.run(lengths_vary):
        assert set(sizes) == {sizes[0]}


def two_forwards_on_disk() -> None:
    """More than one micro-step waits at once: what was not planned goes to disk too."""
    batch = batches(1)[0]
    size = batch["input_ids"].numel() * 32 * 4
    block = {"nvme_path": tempfile.gettempdir(), "host_budget": 2 * (4 * size + 5 * 4096), "keep_last": 0}
    engine = whole_model({"activation_checkpoint_cpu_offload": block, "save_attention_output": False}, "plain")
    losses = [engine.module(**batch).loss for _ in range(2)]
    first, second = (torch.autograd.grad(loss, engine.module.lm_head.weight)[0] for loss in losses)
    assert torch.equal(first, second) and engine.alst_offload.counts.bytes_to_disk > 0
    engine.destroy()


def test_more_than_was_planned_goes_to_disk(ranks2):
    ranks2.run(two_forwards_on_disk)


class TwoStreams(GradientCheckpointingLayer):
    """A layer that is given two views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        first = hidden_states + torch.tanh(self.a(other))
        return torch.stack([first, other * torch.sigmoid(self.b(first))])


def gradients_of_streams(keeps: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(TwoStreams() for _ in range(3))
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    store = ActivationStore(HostBufferPool())
    with PatchSet() as undo:
        if keeps:
            apply_checkpoint_policy(ModelSpec(layers), CheckpointPolicy(store), undo)
        h = torch.randn(2, 1, 5, 8, requires_grad=True)
        for layer in layers:
            h = layer(h[0], h[1])
        h.square().sum().backward()
    assert keeps == (store.counts.bytes_out > 0)
    return [param.grad for param in layers.parameters()]


def test_two_views_of_one_tensor_stay_two():
    plain, kept = gradients_of_streams(False), gradients_of_streams(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def copied() -> None:
    engine = whole_model(offload_keys("host"), "plain")
    engine.backward(engine(**batches(1)[0]).loss)
    twin = copy.deepcopy(engine.module).eval()
    with torch.no_grad():
        assert torch.equal(twin(**batches(1)[0]).loss, engine.module.eval()(**batches(1)[0]).loss)
    engine.destroy()


def test_a_model_can_be_copied(ranks2):
    ranks2.run(copied)


def switched_off() -> None:
    engine = whole_model(offload_keys("host"))
    engine.module.activation_checkpointing_disable()
    with pytest.raises(UnsupportedModelError, match=r"activation_checkpoint_cpu_offload: no layer.*is checkpointed"):
        engine(**batches(1)[0])
    engine.destroy()
    engine = whole_model({"save_attention_output": True})
    with pytest.raises(UnsupportedModelError, match=r"save_attention_output: no layer.*is checkpointed"):
        engine(**batches(1)[0])
    engine.destroy()
    engine = whole_model(offload_keys("host"))
    engine.module.activation_checkpointing_enable(offload=True)
    with pytest.raises(UnsupportedModelError, match="transformers' own offload"):
        engine(**batches(1)[0])
    engine.destroy()


def calls_attention_itself() -> None:
    import deepspeed
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    keys = {**ds_config(Cell(), 1), "alst": offload_keys("outputs")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=keys)[0]
    with pytest.raises(
        UnsupportedModelError, match=r"save_attention_output: none of the first 2 layers .*calls attention"
    ):
        engine(**batches(1)[0])
    engine.destroy()


def test_attention_that_nothing_is_seen_of_is_an_error_too(ranks2):
    ranks2.run(calls_attention_itself)


def test_a_key_that_cannot_act_is_an_error(ranks2):
    ranks2.run(switched_off)


# --- what a layer is given


def test_a_stream_given_by_keyword_is_moved_too():
    from deepspeed_alst.offload.checkpoint_inputs import _as_positional

    def forward(layer, hidden_states, mask=None, extra=None):
        return hidden_states, mask, extra

    hidden, mask = torch.randn(1, 4, 8), torch.zeros(1, 1, 4, 4)
    extra = torch.randn(1, 4, 8, requires_grad=True)
    function = functools.partial(forward, None, mask=mask, extra=extra, hidden_states=hidden)
    called, args = _as_positional(function, (), "hidden_states")
    assert args[0] is hidden and args[1] is extra and len(args) == 2
    found = called(*args)
    assert found[0] is hidden and found[1] is mask and found[2] is extra
    cells = [cell.cell_contents for cell in called.__closure__]
    assert not any(each is hidden or each is function for each in cells), "it would live until the backward"
