"""Dropout and router noise: drawn by counters, so that a split sequence has the numbers of the whole one."""

import threading
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations.neftune import neftune_post_forward_hook

from benchmarks.cells import Cell, KeepFp64, build_model, ds_config, full_weight, model_config, trained
from benchmarks.families import SMALL, family_config
from deepspeed_alst.attention.blocked_sdpa import attend
from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.config.schema import MemoryLeanConfig, TiledLossConfig, TiledMLPConfig
from deepspeed_alst.core.forward_context import Draws, ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import REAL_TOKENS, ShardingConfig, shard_batch
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.memory_lean.feature import run_in_chunks
from deepspeed_alst.random_draws import counter_based as draws
from deepspeed_alst.random_draws.draw_mode import CountedDraws, Forward, branch
from deepspeed_alst.random_draws.model_draws import count_draws
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.tiling.tiled_loss import patch_unsharded_loss, tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from deepspeed_alst.verification.hf_support_checks import check_model

EXACT = 1e-12
# Transformers' casts to fp32, which a recomputation does without the mode that lifts them.
EXACT_BUT_FOR_CASTS = 1e-6
LEAN = MemoryLeanConfig(chunk_tokens=8, tile_tokens=3, key_block=5)

# --- the numbers


def numbers(*key: Any, first: int = 0, rows: int = 2000, columns: int = 501, draw: Any = draws.uniform) -> torch.Tensor:
    return draw(draws.key_of(*key), torch.arange(first, first + rows), columns, torch.float64)


def test_uniform_numbers_have_the_moments_of_their_distribution():
    u = numbers(1)
    count = u.numel()
    for power in (1, 2, 3, 4):
        spread = (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5
        assert abs(u.pow(power).mean() - 1 / (power + 1)) < 4 * spread / count**0.5
    cells = torch.histc(u, 256, 0, 1)
    assert ((cells - count / 256) ** 2 / (count / 256)).sum() < 255 + 4 * 510**0.5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (numbers(1), numbers(2)),
        (numbers(1)[1:], numbers(1)[:-1]),
        (numbers(1)[:, 1:], numbers(1)[:, :-1]),
        (numbers(1), numbers(1, first=2000)),
    ],
    ids=["keys", "rows", "columns", "ranks"],
)
def test_numbers_of_other_draws_tokens_and_channels_have_nothing_to_do_with_one_another(one, other):
    pairs = torch.bincount(((one * 16).long() * 16 + (other * 16).long()).flatten(), minlength=256).double()
    mean = one.numel() / 256
    assert ((pairs - mean) ** 2 / mean).sum() < 255 + 4 * 510**0.5


def test_normal_and_exponential_numbers_have_their_moments():
    z, e = numbers(1, draw=draws.normal), numbers(1, draw=draws.exponential)
    error = 4 / z.numel() ** 0.5
    assert abs(z.mean()) < error and abs(z.var() - 1) < 2 * error and abs(z.pow(3).mean()) < 4 * error
    assert abs(e.mean() - 1) < error and abs(e.var() - 1) < 3 * error and e.min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dropout_drops_with_its_probability_and_scales_what_is_left(dtype):
    x = torch.randn(3, 700, 64, dtype=dtype, requires_grad=True)
    y = draws.dropout(x, 0.3, draws.key_of(5), torch.arange(2100))
    seed = torch.randn_like(y)
    y.backward(seed)
    kept = y != 0
    assert abs(kept.double().mean() - 0.7) < 4 * (0.21 / x.numel()) ** 0.5
    assert torch.equal(y[kept], (x * (1 / 0.7))[kept]) and torch.equal(x.grad, torch.where(kept, seed * (1 / 0.7), 0))


def test_tiles_of_rows_and_of_memory_change_no_number(monkeypatch):
    x, rows = torch.randn(50, 33, dtype=torch.float64), torch.arange(50)
    whole = draws.dropout(x, 0.5, 7, rows)
    monkeypatch.setattr(draws, "_TILE_ELEMENTS", 100)
    assert torch.equal(draws.dropout(x, 0.5, 7, rows), whole)
    assert torch.equal(torch.cat([draws.dropout(x[part], 0.5, 7, rows[part]) for part in rows.split(13)]), whole)


# --- the mode


def forward(rank: int = 0, tokens: int = 12, replica: int = 0, rows: int = 2, key: int = 0) -> CountedDraws:
    return CountedDraws(Forward((key,), replica, rank, rows, tokens))


def drawn(draw: Any, **of: Any) -> torch.Tensor:
    with forward(**of):
        return draw()


BY_TOKEN = {
    "dropout": lambda s: F.dropout(torch.ones(2, s, 5)),
    "nn.Dropout": lambda s: torch.nn.Dropout(0.4)(torch.ones(2, s, 5)),
    "flat": lambda s: F.dropout(torch.ones(2 * s, 5)).view(2, s, 5),
    "in place": lambda s: F.dropout(torch.ones(2, s, 5), inplace=True),
    "torch.dropout": lambda s: torch.dropout(torch.ones(2, s, 5), 0.3, True),
    "uniform_": lambda s: torch.empty(2, s, 5).uniform_(0.9, 1.1),
    "exponential_": lambda s: torch.empty(2, s, 5).exponential_(),
    "normal_": lambda s: torch.empty(2, s, 5).normal_(),
    "bernoulli_": lambda s: torch.empty(2, s, 5).bernoulli_(0.3),
    "bernoulli": lambda s: torch.bernoulli(torch.full((2, s, 5), 0.3)),
    "rand_like": lambda s: torch.rand_like(torch.ones(2, s)),
    "randn": lambda s: torch.randn(2, s, 5),
}
OF_NO_TOKEN = {
    "a layer to skip": lambda: torch.rand([]),
    "rows of a weight": lambda: torch.rand(24) > 0.5,
    "blocks of a weight": lambda: torch.randperm(24),
    "a weight": lambda: F.dropout(torch.nn.Parameter(torch.ones(7, 5))),
    "rows of the batch": lambda: torch.rand(2, 1, 1),
}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_ranks_draw_the_numbers_of_their_tokens_of_the_whole_sequence(name):
    draw = BY_TOKEN[name]
    whole = drawn(lambda: draw(24), tokens=24)
    parts = [drawn(lambda: draw(12), rank=rank) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert not torch.equal(*parts) and len(whole.unique()) > 1
    for other in ({"replica": 1}, {"key": 1}):
        assert not torch.equal(drawn(lambda: draw(24), tokens=24, **other), whole)


@pytest.mark.parametrize("name", OF_NO_TOKEN)
def test_ranks_draw_alike_what_belongs_to_no_token(name):
    first, second, other = (drawn(OF_NO_TOKEN[name], **of) for of in ({}, {"rank": 1}, {"replica": 1}))
    assert torch.equal(first, second)
    assert torch.equal(first, other) == (name == "a layer to skip")


def test_ranks_draw_for_themselves_what_is_of_some_of_their_tokens():
    draws_of = [drawn(lambda: F.dropout(torch.ones(7, 50)), rank=rank) for rank in (0, 1)]
    assert not torch.equal(*draws_of)


def test_calls_and_branches_draw_anew_and_a_branch_again():
    with forward():
        again = branch()
        found = [F.dropout(torch.ones(2, 12, 5)) for _ in range(2)]
        for tile in (None, None, slice(0, 24)):
            with again(tile):
                found.append(F.dropout(torch.ones(24, 5)).view(2, 12, 5))
        with again(slice(3, 9)):
            assert torch.equal(F.dropout(torch.ones(6, 5)), found[2].flatten(0, 1)[3:9])
    with again():  # as in a backward
        assert torch.equal(F.dropout(torch.ones(2, 12, 5)), found[2])
    first, second, branched, repeated, tiled = found
    assert not torch.equal(first, second) and not torch.equal(first, branched)
    assert torch.equal(branched, repeated) and torch.equal(branched, tiled)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: F.gumbel_softmax(torch.ones(2, 12, 5)), "by gumbel_softmax, which is not available"),
        (lambda: F.dropout1d(torch.ones(2, 12, 5)), "by dropout1d"),
        (lambda: torch.nn.AlphaDropout()(torch.ones(2, 12, 5)), "by alpha_dropout"),
        (lambda: torch.randint(5, (2, 12)), "by randint"),
        (lambda: F.dropout(torch.ones(2, 4, 12, 3)), r"shape \[2, 4, 12, 3\] for 2 x 12 tokens"),
    ],
)
def test_what_cannot_be_drawn_for_a_sequence_is_refused(draw, words):
    with forward(), pytest.raises(UnsupportedModelError, match=words):
        draw()


def test_evaluation_and_a_rate_of_0_draw_nothing_and_a_generator_is_left_alone():
    x = torch.ones(2, 12, 5)
    with forward() as mode:
        assert F.dropout(x, training=False) is x or torch.equal(F.dropout(x, training=False), x)
        assert torch.equal(F.dropout1d(x, 0.0), x)
        own = torch.rand(3, generator=torch.Generator().manual_seed(1))
        assert not mode.place.calls
    assert torch.equal(own, torch.rand(3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("mask", [MaskSpec(), MaskSpec(window=7), MaskSpec(documents=(0, 13, 40))])
def test_attention_drops_with_its_probability_and_other_ranks_heads_draw_others(mask):
    make = torch.Generator().manual_seed(1)
    qkv = [torch.randn(1, heads, 40, 8, generator=make, dtype=torch.float64) for heads in (4, 2, 2)]

    def found(**of: Any) -> torch.Tensor:
        return drawn(lambda: attend(*qkv, mask, dropout=0.3), rows=1, tokens=20, **of)

    each = torch.stack([found(key=key) for key in range(200)])
    error = (each.mean(0) - attend(*qkv, mask)).abs()
    assert (error <= 5 * each.std(0) / 200**0.5 + 1e-12).all()
    assert torch.equal(each[0], found(key=0)) and not torch.equal(each[0], found(key=0, rank=1))


# --- models: a split sequence, and the whole one with the same draws


def a_step(
    config: Any, split: bool, checkpointing: str = "", tile: int = 0, lora: bool = False, lean: bool = False
) -> dict[str, Any]:
    """Losses of two micro-steps whose backwards follow both forwards, and the gradients' sum, in fp64."""
    config._experts_implementation = "eager"
    model = build_model(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "down_proj", "lm_head"]
        adapter = LoraConfig(r=4, target_modules=targets, lora_dropout=0.2, init_lora_weights=False)
        model = get_peft_model(model, adapter)
    model = model.double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    make, losses = torch.Generator().manual_seed(3), []
    with PatchSet() as undo:
        if not checkpointing:
            undo.enter_context(KeepFp64())
        calls = ForwardContext(draws=Draws(seed=11))
        if split:
            patch_model(ModelSpec(model), dist.group.WORLD, undo, calls)
        else:
            count_draws(ModelSpec(model), calls, undo)
        if lean:
            made, reasons = run_in_chunks(ModelSpec(model), LEAN, dist.group.WORLD, calls, lambda module: None, undo)
            assert made and not reasons
            undo.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("error", message="alst.memory_lean_layer")
        if tile:
            tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=tile), lambda module: None, undo, calls)
            patch_unsharded_loss(ModelSpec(model), undo) if not split else None
            tile_loss(
                ModelSpec(model), TiledLossConfig(tile_tokens=5, backend="torch"), calls, lambda module: None, undo
            )
        for micro in range(2):
            calls.draws.clock = lambda micro=micro: (4, micro)
            ids = torch.randint(5, SMALL["vocab_size"], (2, 40), generator=make)
            batch = {"input_ids": ids, "labels": ids.clone()}
            if split:
                P = dist.get_world_size()
                batch = shard_batch(batch, P, ShardingConfig(P, marks_padding=True)).shards[dist.get_rank()]
                calls.real_tokens = batch.pop(REAL_TOKENS)
            if tile:  # where a dropout behind the last matrix of an MLP does nothing, and where it does
                model.eval()(**batch, use_cache=False)
                model.train()
            losses.append(model(**batch, use_cache=False).loss)
        for loss in losses:
            loss.backward()
    grads = {name: param.grad for name, param in trained(model).items() if param.grad is not None}
    for grad in grads.values() if split else ():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return {"losses": torch.stack(losses).detach(), **grads}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest, of each tensor's norm, or of what is not rounding beside the largest norm."""
    least = 1e-5 * max(float(tensor.norm()) for tensor in other.values())
    return max(float((one[name] - true).norm()) / max(float(true.norm()), least) for name, true in other.items())


def split_and_whole(config: Any, split: dict[str, Any], whole: dict[str, Any]) -> float:
    return difference(a_step(config, True, **split), a_step(config, False, **whole))


MODELS = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt, layers skipped": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.4, "num_hidden_layers": 5},
    ),
    "gpt_neox": ("gpt_neox", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "seed_oss": ("seed_oss", {}),
    "phimoe": ("phimoe", {"router_jitter_noise": 0.01, "input_jitter_noise": 0.1}),
    "mixtral": ("mixtral", {"router_jitter_noise": 0.1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_split_sequence_draws_what_the_whole_one_draws(name, ranks2):
    model_type, changed = MODELS[name]
    config = family_config(model_type, **changed)
    check_model(ModelSpec(build_model(config)))
    assert ranks2.run(split_and_whole, config, {}, {})[0] < EXACT


def without_dropout(config: Any) -> float:
    still = {name: 0.0 for name in vars(config) if "dropout" in name}
    return difference(a_step(config, True), a_step(type(config)(**{**config.to_dict(), **still}), True))


def test_dropout_does_something(ranks2):
    assert ranks2.run(without_dropout, family_config("seed_oss"))[0] > 1e-2


@pytest.mark.parametrize(
    ("split", "whole"),
    [
        ({"checkpointing": "plain"}, {"checkpointing": "reentrant"}),
        ({"checkpointing": "plain", "tile": 7}, {"checkpointing": "reentrant", "tile": 9}),
        ({"tile": 7}, {"tile": 13}),
    ],
    ids=["checkpoints", "tiles and checkpoints", "tiles"],
)
@pytest.mark.parametrize("lora", [False, True])
def test_recomputations_and_tiles_draw_the_same(split, whole, lora, ranks2):
    config = family_config("llama" if lora else "seed_oss")
    error = ranks2.run(split_and_whole, config, {**split, "lora": lora}, {**whole, "lora": lora})[0]
    assert error < (EXACT_BUT_FOR_CASTS if "checkpointing" in split else EXACT)


@pytest.mark.parametrize("name", ["seed_oss", "gpt_neox"])
def test_layers_in_chunks_draw_the_same(name, ranks2):
    model_type, changed = MODELS[name]
    config = family_config(model_type, **changed)
    error = ranks2.run(
        split_and_whole, config, {"checkpointing": "plain", "lean": True}, {"checkpointing": "reentrant"}
    )[0]
    assert error < EXACT_BUT_FOR_CASTS


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("LoHaConfig", {"rank_dropout": 0.3, "module_dropout": 0.3}),
        ("LoKrConfig", {"rank_dropout": 0.3, "module_dropout": 0.3}),
        ("OFTConfig", {"r": 0, "oft_block_size": 4, "module_dropout": 0.3}),
        ("HiraConfig", {"hira_dropout": 0.3}),
        ("MissConfig", {"miss_dropout": 0.3}),
        ("RandLoraConfig", {"randlora_dropout": 0.3}),
        ("VeraConfig", {"vera_dropout": 0.3, "target_modules": ["q_proj", "o_proj"]}),
    ],
)
def test_dropouts_of_other_adapters_are_exact_too(kind, arguments, ranks2):
    assert ranks2.run(adapter_difference, kind, arguments)[0] < EXACT


def adapter_difference(kind: str, arguments: dict[str, Any]) -> float:
    from tests.integrations.test_peft import adapted, stir

    results = []
    for split in (True, False):
        model = (
            adapted(kind, {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **arguments}).double().train()
        )
        stir(model)
        check_model(ModelSpec(model))
        ids = torch.randint(5, 97, (2, 40), generator=torch.Generator().manual_seed(3))
        batch = {"input_ids": ids, "labels": ids.clone()}
        with PatchSet() as undo, KeepFp64():
            if split:
                batch = shard_batch(batch, 2, ShardingConfig(2)).shards[dist.get_rank()]
                patch_model(ModelSpec(model), dist.group.WORLD, undo)
            else:
                count_draws(ModelSpec(model), ForwardContext(), undo)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        grads = {name: param.grad for name, param in trained(model).items() if param.grad is not None}
        for grad in grads.values() if split else ():
            dist.all_reduce(grad)
            grad /= 2
        results.append({"loss": loss.detach(), **grads})
    return difference(*results)


def test_the_programs_generator_and_other_threads_models_are_left_alone():
    ids = torch.arange(24).view(1, 24) + 5
    other = build_model(family_config("seed_oss")).train()
    found = []

    def evaluate_another(model: torch.nn.Module, *_: Any) -> None:
        def of_thread() -> None:
            torch.manual_seed(5)
            found.append(other(input_ids=ids).logits)

        thread = threading.Thread(target=of_thread)
        thread.start()
        thread.join()

    model = build_model(family_config("seed_oss")).train()
    with PatchSet() as undo:
        count_draws(ModelSpec(model), ForwardContext(), undo)
        before = torch.get_rng_state()
        model(input_ids=ids, labels=ids).loss.backward()
        assert torch.equal(torch.get_rng_state(), before)
        model.model.layers[0].register_forward_pre_hook(evaluate_another)
        model(input_ids=ids)
    torch.manual_seed(5)
    assert torch.equal(found[0], other(input_ids=ids).logits)


def test_forwards_draw_anew_and_on_trial_the_same():
    ids = torch.arange(24).view(1, 24) + 5
    model = build_model(family_config("seed_oss")).train()
    with PatchSet() as undo:
        calls = ForwardContext()
        count_draws(ModelSpec(model), calls, undo)
        first, second = (model(input_ids=ids).logits for _ in range(2))
        calls.checking = True
        third, fourth = (model(input_ids=ids).logits for _ in range(2))
        model.eval()
        calm = model(input_ids=ids).logits
    assert (
        not torch.equal(first, second) and torch.equal(third, fourth) and torch.equal(calm, model(input_ids=ids).logits)
    )


def test_an_error_in_a_forward_leaves_no_mode_behind():
    model = build_model(family_config("seed_oss")).train()
    with PatchSet() as undo:
        count_draws(ModelSpec(model), ForwardContext(), undo)
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 8), 10**6))
        assert torch.overrides._get_current_function_mode_stack() == []
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_draw_the_same_and_what_a_compiler_would_draw_is_refused():
    ids, losses = torch.arange(24).view(1, 24) + 5, []
    for compiled in (False, True):
        model = build_model(family_config("seed_oss")).train()
        with PatchSet() as undo:
            count_draws(ModelSpec(model), ForwardContext(), undo)
            for layer in model.model.layers if compiled else ():
                layer.mlp.compile(backend="aot_eager")
            losses.append(model(input_ids=ids, labels=ids).loss)
            if compiled:
                model.model.norm = torch.compile(Noisy(), backend="aot_eager")
                with pytest.raises(UnsupportedModelError, match="compiled code has drawn random numbers"):
                    model(input_ids=ids, labels=ids)
    assert torch.equal(*losses)


class Noisy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_programs_own_is_refused(reentrant):
    x = torch.ones(2, 12, 5, requires_grad=True)
    with forward(), pytest.raises(UnsupportedModelError, match=r"model\.activation_checkpointing_enable"):
        checkpoint(F.dropout, x, use_reentrant=reentrant)


def test_neftunes_noise_is_refused_where_a_sequence_is_split():
    model = build_model(family_config("llama")).train()
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    with PatchSet() as undo:
        count_draws(ModelSpec(model), ForwardContext(draws=Draws(sp_size=4)), undo)
        with pytest.raises(UnsupportedModelError, match=r"neftune_noise_alpha=5\.0: .* leave it out"):
            model(input_ids=torch.arange(64).view(1, 64))
    model(input_ids=torch.arange(64).view(1, 64))


# --- the engine


def an_engine(stage: int) -> Any:
    import deepspeed

    from tests.integrations.test_peft import adapted, stir

    # The model check compares whole and split, dropouts included.
    adapter = {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"], "lora_dropout": 0.1}
    config = model_config(Cell())
    config.attention_dropout = 0.1
    model = adapted("LoraConfig", adapter, build_model(config))
    stir(model)
    model.gradient_checkpointing_enable()
    torch.manual_seed(dist.get_rank())  # rank 0's counts
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    keys = ds_config(Cell(stage=stage, tiles=True), 2)
    return deepspeed.initialize(model=model.train(), optimizer=optimizer, config=keys)[0]


def an_optimizer_step(engine: Any, index: int) -> list[float]:
    import deepspeed_alst

    ids = torch.randint(5, 97, (1, 48), generator=torch.Generator().manual_seed(10 * index + dist.get_rank()))
    losses = []
    for batch in deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train_and_resume(stage: int, folder: str) -> list[list[float]]:
    """Losses of three steps; the third is done again after a resume, to the same bits."""
    engine = an_engine(stage)
    losses = [an_optimizer_step(engine, index) for index in range(2)]
    engine.save_checkpoint(folder)
    losses.append(an_optimizer_step(engine, 2))
    weights = [full_weight(param) for param in trained(engine.module).values()]
    engine.destroy()
    engine = an_engine(stage)
    engine.load_checkpoint(folder)
    assert an_optimizer_step(engine, 2) == losses[2]
    resumed = [full_weight(param) for param in trained(engine.module).values()]
    assert all(torch.equal(*pair) for pair in zip(resumed, weights, strict=True))
    engine.destroy()
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_training_draws_on_where_it_was(stage, ranks2, tmp_path):
    first, second = ranks2.run(train_and_resume, stage, str(tmp_path))
    assert first == second and len({loss for step in first for loss in step}) == 6
