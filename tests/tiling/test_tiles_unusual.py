"""Tiles in programs that do unusual things: hooks, replaced forwards, logits kept, two engines on a model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from benchmarks.cells import Cell, build_model, ds_config, model_config, samples
from benchmarks.families import family_config
from deepspeed_alst.config.schema import TiledMLPConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import SetupError, UnsupportedModelError
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from tests.tiling.test_tiled_loss import batch, step, tile
from tests.tiling.test_tiled_mlp import EXACT, error, model_of, no_leaf

KEYS = {"tiled_mlp_compute": {"tile_tokens": 7}, "tiled_logits_loss": {"tile_tokens": 5}}


def start(stage: int, change: Callable[[Any], Any] = lambda model: None, alst: Any = KEYS) -> Any:
    """An engine at SP 1 on a small Llama that the program has changed before."""
    import deepspeed

    model = build_model(model_config(Cell())).train()
    change(model)
    config = ds_config(Cell(stage=stage), 1)
    if alst is not None:
        config["alst"] = alst
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def one_batch() -> dict[str, torch.Tensor]:
    return samples(Cell(), 97)[0][dist.get_rank()][0]


def gradients(stage: int, change: Callable[[Any], Any], alst: Any) -> dict[str, torch.Tensor]:
    """Of a loss and whatever ``change`` says comes on top."""
    extra: Any = None

    def remember(model: Any) -> None:
        nonlocal extra
        extra = change(model)

    engine = start(stage, remember, alst)
    loss = engine(**one_batch()).loss
    engine.backward(loss if extra is None else loss + extra())
    found = {name: safe_get_full_grad(param).clone() for name, param in engine.module.named_parameters()}
    engine.step()
    engine.destroy()
    return found


def penalty_by_a_hook(model: Any) -> Callable[[], torch.Tensor]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: outputs.append(output.pow(2).mean()))
    # The recomputation runs the hooks too.
    return lambda: 0.1 * sum(outputs[: len(model.model.layers)])


def doubled_matrix(model: Any) -> None:
    for layer in model.model.layers:
        forward = layer.mlp.down_proj.forward
        layer.mlp.down_proj.forward = lambda x, forward=forward: 2 * forward(x)


def same_gradients(stage: int, change: Callable[[Any], Any]) -> None:
    whole, tiled = (gradients(stage, change, alst) for alst in (None, KEYS))
    for name, expected in whole.items():
        assert (tiled[name] - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize("change", [penalty_by_a_hook, doubled_matrix])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_a_program_does_to_a_module_has_its_gradient(stage, change, ranks2):
    ranks2.run(same_gradients, stage, change)


def test_a_value_that_is_used_after_all_gives_no_wrong_gradient():
    """The net below the hooks: what the recomputation left out is no number."""
    model = build_model(family_config("llama")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=7), no_leaf, undo)
        model(**batch(), use_cache=False).loss.backward()  # now it is known that nothing needs the value
        model.zero_grad()
        layer = model.model.layers[0]
        seen = []

        def spy(output: torch.Tensor) -> torch.Tensor:
            seen.append(output.square().sum())
            return output

        own = layer.mlp.forward
        layer.mlp.forward = lambda x: spy(own(x))  # where no hook of the program's shows
        undo.callback(vars(layer.mlp).__setitem__, "forward", own)
        loss = model(**batch(), use_cache=False).loss + seen[0]
        loss.backward()
        gradient = layer.input_layernorm.weight.grad
        assert gradient.isnan().any()


def a_weight_from_elsewhere(module: torch.nn.Module, model: Any) -> None:
    model.elsewhere = torch.nn.Parameter(torch.full((1,), 1.5, dtype=torch.float64))
    forward = module.forward
    module.forward = lambda x: forward(x) * model.elsewhere


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_program_around_a_checkpointed_model(reentrant):
    model, labels = model_of("llama"), batch()["labels"]
    model.activation_checkpointing_enable({"use_reentrant": False})
    hidden = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=hidden, labels=labels, use_cache=False).loss

    expected = torch.autograd.grad(loss(hidden), hidden)[0]
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=7), no_leaf, undo)
        loss(hidden).backward()  # after which values that no backward uses are known
        hidden.grad = None
        torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    assert error(hidden.grad, expected) < EXACT


def test_a_weight_that_is_not_the_modules_own_is_refused_by_name():
    model = model_of("llama")
    a_weight_from_elsewhere(model.model.layers[0].mlp, model)
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=7), no_leaf, undo)
        with pytest.raises(
            UnsupportedModelError, match=r"layers.0.mlp uses a weight of shape \[1\] that is not one of its"
        ):
            step(model, batch())
    model = model_of("llama")
    a_weight_from_elsewhere(model.lm_head, model)
    with PatchSet() as undo:
        tile(model, undo)
        with pytest.raises(UnsupportedModelError, match="The head uses a weight of shape"):
            step(model, batch())


def mlp_forwards(stage: int, reentrant: bool) -> list[float]:
    """Tokens that pass an MLP's first matrix in each step, of the batch's."""
    rows = []

    def count(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        matrix = model.model.layers[1].mlp.gate_proj
        matrix.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[-2]))

    engine = start(stage, count)
    found = []
    for _ in range(3):
        rows.clear()
        data = one_batch()
        engine.backward(engine(**data).loss)
        engine.step()
        found.append(sum(rows) / data["input_ids"].numel())
    engine.destroy()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpointed_step_has_two_mlp_forwards_with_and_without_zero3(stage, reentrant, ranks2):
    assert ranks2.run(mlp_forwards, stage, reentrant)[0][1:] == [2.0, 2.0]


# --- logits of an evaluation


def test_a_loss_that_is_not_made_in_tiles_is_refused():
    """A head whose logits are worked on by a way that is not known."""
    model = model_of("llama")
    forward = model.lm_head.forward
    with PatchSet() as undo:
        tile(model, undo)
        own = model.loss_function
        model.loss_function = lambda logits, **kwargs: own(logits=logits.softmax(-1), **kwargs)
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM computes its loss from full logits"):
            step(model, batch())
    assert forward == model.lm_head.forward


def test_a_model_that_only_copies_its_logits_is_tiled():
    model = model_of("opt", word_embed_proj_dim=32, ffn_dim=48, do_layer_norm_before=True, dropout=0.0)
    loss, grads = step(model, batch())
    with PatchSet() as undo:
        tile(model, undo)
        tiled_loss, tiled = step(model, batch())
        assert model(**batch()).logits is None
    assert abs(tiled_loss - loss) < EXACT * loss
    assert all(error(tiled[name], true) < 1e-9 for name, true in grads.items() if "k_proj.bias" not in name)


def test_logits_are_a_tensor_in_all_that_programs_do_to_them():
    model, tokens = model_of("llama").eval(), batch()["input_ids"]
    true = model(input_ids=tokens).logits
    with PatchSet() as undo, torch.no_grad():
        tile(model, undo)

        def logits() -> torch.Tensor:
            return model(input_ids=tokens, labels=tokens).logits

        assert isinstance(logits(), torch.Tensor) and logits().dtype == true.dtype and logits().requires_grad is False
        torch.testing.assert_close(torch.cat([logits(), logits()]), torch.cat([true, true]))
        for function in (
            lambda x: x > 0,
            lambda x: 1 / x,
            lambda x: 1 - x,
            lambda x: x**2,
            lambda x: -x,
            lambda x: x.contiguous().view(-1),
            lambda x: x.detach().mul_(2).add_(1),
            lambda x: torch.stack(list(x)),
            lambda x: x.log_softmax(-1).numpy(),
        ):
            assert (torch.as_tensor(function(logits())) == torch.as_tensor(function(true.clone()))).all()
        kept = logits()
        kept *= 2
        kept.div_(4)
        torch.testing.assert_close(kept + 0, true / 2)
        import copy
        import pickle

        assert torch.equal(pickle.loads(pickle.dumps(logits())), true) and torch.equal(copy.deepcopy(logits()), true)


def kept_over_a_step(stage: int) -> float:
    """Logits of an evaluation, looked at after a training step; how far they are from those before it."""
    engine = start(stage)
    engine.eval()
    with torch.no_grad():
        true, kept = engine(**one_batch()).logits + 0, engine(**one_batch()).logits
    engine.train()
    try:
        engine.backward(engine(**one_batch()).loss)
        engine.step()
        return float((kept - true).abs().max())
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_logits_kept_over_a_step_are_those_of_their_evaluation(stage, ranks2):
    assert ranks2.run(kept_over_a_step, stage) == [0.0, 0.0]


def looked_at_by_one(stage: int) -> None:
    """Rank 0 alone looks at an evaluation's logits, and all go on together."""
    engine = start(stage)
    engine.eval()
    with torch.no_grad():
        logits = engine(**one_batch()).logits
        if dist.get_rank() == 0:
            assert logits[:, -1].argmax(-1).shape == (1,)
        assert engine(**one_batch()).loss.isfinite()
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_may_look_at_logits_alone(stage, ranks2):
    ranks2.run(looked_at_by_one, stage)


# --- engines and keys


def second_engine(alst: Any) -> str:
    import deepspeed

    engine = start(2)
    model = engine.module
    config = {**ds_config(Cell(), 1), **({} if alst is None else {"alst": alst})}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except SetupError as refused:
        engine.destroy()
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0].destroy()
        return str(refused)
    return ""


@pytest.mark.parametrize("alst", [None, KEYS])
def test_a_second_engine_on_a_model_is_refused_until_the_first_is_destroyed(alst, ranks2):
    assert all("Call destroy() of that engine" in refused for refused in ranks2.run(second_engine, alst))


def test_a_module_that_mixes_tokens_is_refused_when_it_is_called():
    model = build_model(family_config("rwkv", attention_hidden_size=32), core="eager").train()
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=7), no_leaf, undo)
        with pytest.raises(UnsupportedModelError, match=r"cannot run in tiles|token tensors"):
            model(**batch(), use_cache=False)
