"""Mixtures of experts: the router's loss is the whole sequence's, at coefficient 1; experts of their own on all ranks.

Its value and every gradient against transformers' own, in fp64 and in engines.
"""

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.mixtral import modeling_mixtral

from benchmarks.cells import Cell, build_model, ds_config, samples
from benchmarks.families import family_config
from benchmarks.ranks import RankError
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import REAL_TOKENS, ShardingConfig, shard_batch
from deepspeed_alst.moe.mixtures import load_balancing_loss, router_problem, unknown_router_loss
from deepspeed_alst.sequence_parallel.feature import patch_model
from tests.models import family_batch, split_and_whole

EXACT = 1e-12
WITH_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
FAMILIES = (
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "flex_olmo",
    "phimoe",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "jetmoe",
)


def mixture(model_type: str, **changed: Any) -> Any:
    coefficient = {"aux_loss_coef": 1.0} if model_type == "jetmoe" else {}
    return family_config(model_type, **WITH_LOSS, **coefficient, **changed)


# --- in fp64, against transformers' own loss of the whole batch


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_sequence(model_type, padding, ranks2):
    # 37 tokens in shards of 24, so the second ends with 11 of ours; of the first row 9 or 20 more are masked.
    loss, grads = ranks2.run(split_and_whole, mixture(model_type), 37, 2, 2, 48, padding)[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)
    assert any("gate.weight" in name or "router" in name for name in grads)


def test_a_rank_without_a_real_token_takes_part(ranks2):
    loss, grads = ranks2.run(split_and_whole, mixture("qwen3_moe"), 5, 1, 2, 16)[0]
    assert loss < EXACT and max(grads.values()) < EXACT


def values(seed: int) -> dict[str, torch.Tensor]:
    """This rank's share of a loss of random logits, with transformers' of the whole and of the shards beside it."""
    layers, batch, length, experts, top_k = 3, 2, 8, 5, 2
    P, rank = dist.get_world_size(), dist.get_rank()
    make = torch.Generator().manual_seed(seed)
    whole = torch.randn(layers, batch, length, experts, generator=make).double()
    # The shards of the sequence like other experts: their means multiplied are far from the whole's.
    whole[:, :, : length // P, 0] += 4.0
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 5:] = 0
    own = slice(rank * length // P, (rank + 1) * length // P)
    logits = [whole.clone().requires_grad_(), whole[:, :, own].clone().requires_grad_()]
    theirs = modeling_mixtral.load_balancing_loss_func(tuple(logits[0].flatten(1, 2)), experts, top_k, mask)
    real = (mask[:, own] != 0).flatten()
    ours = load_balancing_loss(tuple(logits[1].flatten(1, 2)), experts, top_k, real, dist.group.WORLD)
    shard = modeling_mixtral.load_balancing_loss_func(
        tuple(whole[:, :, own].flatten(1, 2)), experts, top_k, mask[:, own]
    )
    dist.all_reduce(shard)
    seed_grad = torch.tensor(0.7)
    (grad,) = torch.autograd.grad(theirs, logits[0], seed_grad)
    (own_grad,) = torch.autograd.grad(ours, logits[1], seed_grad)
    found = {"theirs": theirs, "ours": ours, "mean": shard / P, "grad": grad[:, :, own], "own_grad": own_grad / P}
    return {name: x.detach() for name, x in found.items()}


def test_it_is_not_the_mean_of_the_shards_losses(ranks2):
    for found in ranks2.run(values, 0):
        torch.testing.assert_close(found["ours"], found["theirs"], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(found["own_grad"], found["grad"], rtol=1e-5, atol=1e-8)
        assert abs(found["mean"] - found["theirs"]) > 0.05 * found["theirs"], "this test would not see a mean of shards"


def fused() -> tuple[float, float]:
    """Losses of TRL's fused head, whole and split: its own and the router's."""
    from trl.trainer.utils import add_fused_lm_head

    batch = family_batch(16, 1)
    losses = []
    for split in (False, True):
        model = build_model(mixture("olmoe"))
        add_fused_lm_head(model)
        with PatchSet() as undo:
            if split:
                calls = ForwardContext()
                patch_model(ModelSpec(model), dist.group.WORLD, undo, calls)
                batch = shard_batch(batch, 2, ShardingConfig(2, marks_padding=True)).shards[dist.get_rank()]
                calls.real_tokens = batch.pop(REAL_TOKENS)
            losses.append(model(**batch, fused_lm_head=True).loss.item())
    return losses[0], losses[1]


def test_it_is_added_to_the_loss_of_a_fused_head(ranks2):
    for whole, split in ranks2.run(fused):
        assert split == pytest.approx(whole, rel=1e-6)


# --- engines


def trained(model_type: str, sp_size: int, cell: Cell, tiles: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Of two steps: the losses of this rank's own samples, whole and the router's, and the gradients."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    import deepspeed_alst

    config = ds_config(cell, sp_size)
    if sp_size > 1:
        config["alst"] |= {"pad_to_multiple_of": 16, **tiles}
    model = build_model(mixture(model_type)).train()
    if cell.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": cell.checkpointing == "reentrant"})
        model.enable_input_require_grads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    losses, grads = [], {}
    for step in range(2):
        own = samples(cell, 97)[step][dist.get_rank()]
        for micro_step, batch in enumerate(deepspeed_alst.shard_dataloader(own, engine)):
            output = engine(**batch)
            engine.backward(output.loss)
            if micro_step % sp_size == dist.get_rank() % sp_size:
                losses.append((output.loss.item(), output.aux_loss.item()))
            if engine.is_gradient_accumulation_boundary():
                for name, param in engine.module.named_parameters():
                    grads[f"{name} {step}"] = safe_get_full_grad(param).double().clone()
            engine.step()
    engine.destroy()
    return losses, grads


TILES = {"tiled_mlp_compute": {"tile_tokens": 7}, "tiled_logits_loss": {"tile_tokens": 5}}


@pytest.mark.parametrize(
    ("model_type", "stage", "checkpointing", "tiles"),
    [
        pytest.param("olmoe", 2, "", {}, marks=pytest.mark.slow),
        ("olmoe", 3, "non-reentrant", TILES),
        # Its block is a ZeRO-3 leaf of DeepSpeed's own choice.
        ("qwen3_moe", 3, "", {}),
        pytest.param("qwen3_moe", 0, "non-reentrant", TILES, marks=pytest.mark.slow),
    ],
)
def test_an_engine_steps_as_without_sequence_parallelism(model_type, stage, checkpointing, tiles, ranks2):
    cell = Cell(stage=stage, gas=2, odd_lengths=True, unequal_labels=True, checkpointing=checkpointing)
    whole, split = (ranks2.run(trained, model_type, sp_size, cell, tiles) for sp_size in (1, 2))
    for (expected, _), (found, _) in zip(whole, split, strict=True):
        assert found == [pytest.approx(each, rel=1e-5) for each in expected]
    for name, grad in whole[0][1].items():
        assert (split[0][1][name] - grad).norm() <= 3e-6 * grad.norm(), name


# --- experts of their own


class Expert(torch.nn.Module):
    def __init__(self, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> None:
        super().__init__()
        self.up = torch.nn.Linear(*reversed(gate_up_proj.shape), bias=False)
        self.down = torch.nn.Linear(*reversed(down_proj.shape), bias=False)
        self.up.weight.data.copy_(gate_up_proj)
        self.down.weight.data.copy_(down_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(torch.nn.functional.silu(gate) * up)


class SeparateExperts(torch.nn.Module):
    """A mixture's block as it was before transformers stacked the experts: those without a token are not called."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.gate, stacked = block.gate, block.experts
        pairs = zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True)
        self.experts = torch.nn.ModuleList([Expert(*pair) for pair in pairs])
        self.called: set[int] = set()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.flatten(0, -2)
        _, weights, index = self.gate(x)
        output = torch.zeros_like(x)
        self.called = set(index.flatten().tolist())
        for expert in sorted(self.called):
            tokens, place = (index == expert).nonzero(as_tuple=True)
            output = output.index_add(0, tokens, self.experts[expert](x[tokens]) * weights[tokens, place, None])
        return output.view_as(hidden)


def separate(
    sp_size: int, stage: int, tiles: dict[str, Any], checkpointing: bool = False, apart: bool = False
) -> tuple[list[set[int]], Any]:
    """The experts that this rank's first forward called, and the gradients of a step.

    Tokens up to 47 go to the first two experts, others to the last two. Samples have first the ones, then the others;
    or, ``apart``, each rank's has one kind.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    import deepspeed_alst

    model = build_model(mixture("mixtral")).train()
    model.model.embed_tokens.weight.data[:, 0] = torch.where(torch.arange(97) < 48, 30.0, -30.0)
    for layer in model.model.layers:
        layer.mlp = SeparateExperts(layer.mlp)
        layer.mlp.gate.weight.data[:, 0] = torch.tensor([3.0, 3.0, -3.0, -3.0])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    config = ds_config(Cell(stage=stage), sp_size)
    config["alst"] = {**config.get("alst", {}), **tiles}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)[0]
    first = torch.arange(24) + 24 * dist.get_rank()
    ids = (torch.arange(48) + 48 * dist.get_rank() if apart else torch.cat([first, first + 48]))[None]
    called: list[set[int]] = []
    for batch in deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine):
        engine.backward(engine(**batch).loss)
        called = called or [layer.mlp.called for layer in engine.module.model.layers]
        if engine.is_gradient_accumulation_boundary():
            grads = {name: safe_get_full_grad(param).clone() for name, param in engine.module.named_parameters()}
        engine.step()
    engine.destroy()
    return called, grads


WHOLE = {"tiled_logits_loss": False}


def assert_apart(ranks: Any, expected: Any, *case: Any) -> None:
    """The ranks called different experts, and have the gradients of a run in which DeepSpeed fills in what lacks."""
    found = ranks.run(separate, *case)
    assert [called for called, _ in found] == [[{0, 1}] * 2, [{2, 3}] * 2]
    for name, grad in expected[0][1].items():
        assert (found[0][1][name] - grad).norm() <= 1e-4 * grad.norm(), name


@pytest.mark.parametrize(
    ("stage", "tiles", "checkpointing"),
    [
        (1, {}, False),
        pytest.param(2, {}, False, marks=pytest.mark.slow),
        pytest.param(2, TILES, True, marks=pytest.mark.slow),
        pytest.param(3, {}, False, marks=pytest.mark.slow),
        (3, TILES, True),
    ],
)
def test_a_rank_without_tokens_for_an_expert_brings_its_part_of_the_gradient(stage, tiles, checkpointing, ranks2):
    assert_apart(ranks2, ranks2.run(separate, 1, 0, WHOLE), 2, stage, tiles, checkpointing)


@pytest.mark.parametrize("stage", [2, 3])
def test_without_sequence_parallelism_it_does_so_too(stage, ranks2):
    assert_apart(ranks2, ranks2.run(separate, 1, 0, WHOLE, False, True), 1, stage, WHOLE, False, True)


# --- whose function it is, and when


def family_module(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@pytest.mark.parametrize("name", ["gpt_oss", "jamba", "dbrx", "minimax", "qwen2_moe"])
def test_transformers_function_is_the_known_one(name):
    module = family_module(name)
    model = build_model(family_config("mixtral"))
    with PatchSet() as undo:
        undo.callback(setattr, modeling_mixtral, "load_balancing_loss_func", modeling_mixtral.load_balancing_loss_func)
        modeling_mixtral.load_balancing_loss_func = module.load_balancing_loss_func
        assert unknown_router_loss(ModelSpec(model)) is None


def test_it_is_known_among_fake_tensors(monkeypatch):
    original = modeling_mixtral.load_balancing_loss_func
    # A function of its own: what is known of the other one is kept.
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *args: original(*args))
    model = build_model(family_config("mixtral"))
    with FakeTensorMode():
        assert unknown_router_loss(ModelSpec(model)) is None


def test_another_loss_of_the_routers_is_refused_by_name():
    model = build_model(family_config("doge", is_moe=True, num_experts=4, num_experts_per_tok=2))
    assert "modeling_doge.load_balancing_loss_func is not the load-balancing loss that is known" in str(
        unknown_router_loss(ModelSpec(model))
    )


class Subclass(modeling_mixtral.MixtralForCausalLM):
    def forward(self, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


class SubSubclass(Subclass):
    def forward(self, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


def beside_another(kind: type) -> None:
    """During a forward of a split model another of its family is evaluated in a thread; a failed forward, too."""
    function = modeling_mixtral.load_balancing_loss_func
    torch.manual_seed(0)
    other, model = (kind(mixture("mixtral")).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    batch = family_batch(8, 1)
    expected = other(**batch).aux_loss
    with PatchSet() as undo:
        calls = ForwardContext()
        patch_model(ModelSpec(model), dist.group.WORLD, undo, calls)
        shard = shard_batch(batch, 2, ShardingConfig(2, marks_padding=True)).shards[dist.get_rank()]
        calls.real_tokens = shard.pop(REAL_TOKENS)

        def evaluate_other(*_: Any) -> None:
            assert modeling_mixtral.load_balancing_loss_func is function
            if dist.get_rank() == 0:  # one rank alone: a collective would wait for the other
                with ThreadPoolExecutor(1) as thread:
                    assert torch.equal(thread.submit(other, **batch).result(60).aux_loss, expected)

        model.lm_head.register_forward_hook(evaluate_other)
        torch.testing.assert_close(model(**shard).aux_loss, expected)
        model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**shard)
        assert modeling_mixtral.load_balancing_loss_func is function
    assert type(model) is kind and "forward" not in vars(model)


@pytest.mark.parametrize("kind", [modeling_mixtral.MixtralForCausalLM, Subclass, SubSubclass])
def test_another_model_evaluated_in_a_thread_keeps_its_own_function(kind, ranks2):
    ranks2.run(beside_another, kind, seconds=120)


def compiled() -> tuple[float, float]:
    model, batch = build_model(mixture("mixtral")), family_batch(8, 1)
    expected = model(**batch).aux_loss.item()
    with PatchSet() as undo:
        calls = ForwardContext()
        patch_model(ModelSpec(model), dist.group.WORLD, undo, calls)
        shard = shard_batch(batch, 2, ShardingConfig(2, marks_padding=True)).shards[dist.get_rank()]
        calls.real_tokens = shard.pop(REAL_TOKENS)
        return torch.compile(model, backend="eager")(**shard).aux_loss.item(), expected


@pytest.mark.slow
def test_it_is_made_outside_of_compiled_graphs(ranks2):
    for found, expected in ranks2.run(compiled):
        assert found == pytest.approx(expected, rel=1e-6)


def unmarked(case: str) -> None:
    import deepspeed

    import deepspeed_alst

    model = build_model(mixture("qwen3_moe")).train()
    if case == "reentrant":
        model.activation_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    if case == "own":
        forward = model.forward
        model.forward = lambda **kwargs: with_own_loss(forward(**kwargs, output_router_logits=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(), 2))[0]
    try:
        for batch in deepspeed_alst.shard_dataloader(samples(Cell(), 97)[0][dist.get_rank()], engine):
            if case == "unmarked":
                del batch[REAL_TOKENS]
            engine(**batch)
    finally:
        engine.destroy()


def with_own_loss(output: Any) -> Any:
    output.aux_loss = torch.ones(())
    return output


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("unmarked", "does not say in alst_real_tokens which tokens are padding"),
        ("reentrant", "a reentrant checkpoint records router logits without a gradient"),
        ("own", "made its router's loss without load_balancing_loss_func"),
    ],
)
def test_what_cannot_be_right_is_refused(case, sentence, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(unmarked, case)
    assert all(isinstance(error, ValueError) and sentence in str(error) for error in caught.value.errors)


def test_a_program_that_aggregates_the_shards_losses_is_refused():
    model, calls = (
        build_model(mixture("mixtral")),
        ForwardContext(makes_whole_loss=False, real_tokens=torch.ones(1, 4).bool()),
    )
    assert "which this program aggregates itself" in str(router_problem(ModelSpec(model), {}, calls))
    assert router_problem(ModelSpec(model), {"output_router_logits": False}, calls) is None
    calls.makes_whole_loss = True
    assert router_problem(ModelSpec(model), {}, calls) is None


def test_without_a_router_there_is_nothing_to_refuse():
    model = build_model(family_config("llama"))
    assert router_problem(ModelSpec(model), {"output_router_logits": True}, ForwardContext()) is None
