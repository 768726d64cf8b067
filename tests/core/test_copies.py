"""Copies of a model that an engine trains: by copy.deepcopy, pickle and torch.save, each works alone."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, model_config
from benchmarks.families import family_config
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.errors import UnsupportedModelError

LENGTH = 48
OFFLOADED = {"activation_checkpoint_cpu_offload": True, "tiled_logits_loss": True, "save_attention_output": True}
WHOLE = (("alst", OFFLOADED),)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def noted(module: torch.nn.Module, args: Any, output: Any) -> None:
    """A hook of the program's."""


def engine_of(cell: Cell, config: Any = None, lora: bool = False) -> Any:
    import deepspeed

    model = build_model(config or model_config(cell))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    if cell.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.register_forward_hook(noted)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(cell, cell.sp_size))[0]


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    ids = (torch.arange(LENGTH)[None] * 7 + rank) % 90
    return {"input_ids": ids, "labels": ids.clone()}


def train(engine: Any) -> list[float]:
    import deepspeed_alst

    losses = []
    for batch in deepspeed_alst.shard_dataloader([batch_of(dist.get_rank())], engine):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def copied(cell: Cell, *arguments: Any) -> tuple[list[list[float]], list[float], list[str]]:
    """Losses of each copy on the batches of the engine's next step, its losses, and what is wrong with a copy."""
    engine = engine_of(cell, *arguments)
    train(engine)
    ranks = range(2) if cell.sp_size == 2 else [dist.get_rank()]
    losses, wrong = [], []
    # transformers' own hook for checkpointing cannot be pickled.
    for make in (copy.deepcopy,) if cell.checkpointing else (copy.deepcopy, by_pickle, by_torch_save):
        twin = make(engine.module)
        base, said = ModelSpec(twin).model, f"{make.__name__}: "
        if not cell.checkpointing and b"deepspeed" in pickle.dumps(twin):
            wrong.append(said + "something of an engine's is left")
        if type(base.config._attn_implementation) is not str or noted not in twin._forward_hooks.values():
            wrong.append(said + "not as the program made it")
        if base.is_gradient_checkpointing != bool(cell.checkpointing):
            wrong.append(said + "checkpointing is not the program's")
        outputs = [twin(**batch_of(rank)) for rank in ranks]
        outputs[0].loss.backward()
        losses.append([each.loss.item() for each in outputs])
        if outputs[0].logits.shape[1] != LENGTH:
            wrong.append(said + "not a whole sequence")
        if not all((param.grad is not None) == param.requires_grad for param in twin.parameters()):
            wrong.append(said + "gradients are missing")
    after = train(engine)
    engine.destroy()
    return losses, after, wrong


MIXTURE = family_config("olmoe", output_router_logits=True, router_aux_loss_coef=1.0)
CASES = {
    "tiles, checkpointed by the program": (Cell(tiles=True, checkpointing="non-reentrant", offload="outputs"),),
    "checkpointed by this package": (Cell(offload="host"),),
    "a mixture with its router's loss": (Cell(tiles=True), MIXTURE),
    "lora": (Cell(stage=1, tiles=True), None, True),
    "whole sequences": (Cell(sp_size=1, extra=WHOLE),),
}


@pytest.mark.parametrize("case", CASES)
def test_a_copy_works_alone_and_the_engine_goes_on(case, ranks2):
    for losses, after, wrong in ranks2.run(copied, *CASES[case]):
        assert wrong == []
        assert losses and all(each == pytest.approx(after, rel=1e-5) for each in losses)


def sharded() -> tuple[str, float, float]:
    import deepspeed

    engine = engine_of(Cell(stage=3, tiles=True))
    with pytest.raises(UnsupportedModelError) as raised:
        copy.deepcopy(engine.module)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        twin = by_pickle(engine.module)
    loss = twin(**batch_of(0)).loss.item()
    first = train(engine)[0]
    engine.destroy()
    return str(raised.value), loss, first


def test_under_zero3_a_model_is_copied_where_its_weights_are_gathered(ranks2):
    for said, loss, first in ranks2.run(sharded):
        assert "LlamaForCausalLM cannot be copied or pickled under ZeRO 3" in said and "GatheredParameters" in said
        assert loss == pytest.approx(first, rel=1e-5)
