"""One step of a small model in fp64, whole and split."""

import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.cells import KeepFp64, build_model
from benchmarks.families import SMALL
from deepspeed_alst.config.schema import MemoryLeanConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import REAL_TOKENS, ShardingConfig, shard_batch
from deepspeed_alst.distributed.mesh import build_control_group, build_groups
from deepspeed_alst.memory_lean import decoder_layer, feature, norm
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.verification.verify_model import verify_model


def family_batch(length: int, rows: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random tokens, of which every third has no label."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL["vocab_size"], (rows, length), generator=make)
    labels = ids.clone()
    labels[:, ::3] = -100
    return {"input_ids": ids, "labels": labels}


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Whatever a patch could have changed: classes, attributes and hooks of all modules, and their configs' attention.

    Hooks that transformers adds in a first forward, and keeps, are left out.
    """
    state: dict[str, Any] = {"config": model.config._attn_implementation}
    for name, module in model.named_modules():
        own = {key: id(value) for key, value in vars(module).items() if key != "_output_capturing_hooks_installed"}
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        mine = [id(each) for each in hooks if "output_capturing" not in getattr(each, "__module__", "")]
        state[name] = (type(module), own, mine)
    return state


def step_in_fp64(
    config: Any,
    batch: dict[str, torch.Tensor],
    group: Any = None,
    multiple: int = 0,
    lean: MemoryLeanConfig | None = None,
    core: str = "",
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, all in fp64: whole if there is no group, else split over it.

    Split, the sequence is padded to a ``multiple``, by default of the number of ranks, and layers run in the chunks of
    a ``lean`` config, if there is one. ``core`` replaces the attention that the model is built with.
    Gradients of the split run are averaged over the ranks, as DeepSpeed does it.
    """
    # Eager experts: the grouped matrix product of the default has no fp64.
    config._experts_implementation = "eager"
    model = build_model(config).double()
    model.config._attn_implementation = core or model.config._attn_implementation
    if lean is not None:
        model.activation_checkpointing_enable({"use_reentrant": False})
    before = state_of(model)
    with PatchSet() as patches, KeepFp64():
        if group is not None:
            sp_size, calls = dist.get_world_size(group), ForwardContext()
            batch = shard_batch(batch, sp_size, ShardingConfig(multiple or sp_size, marks_padding=True)).shards[
                dist.get_rank(group)
            ]
            calls.real_tokens = batch.pop(REAL_TOKENS)
            patch_model(ModelSpec(model), group, patches, calls)
        if lean is not None:
            calls = ForwardContext() if group is None else calls
            # Autograd runs backwards without modes: layers enter them again as they do with autocast.
            for module in (decoder_layer, norm):
                patches.enter_context(mock.patch.object(module, "current_autocast", lambda kind: KeepFp64))
            layers, reasons = feature.run_in_chunks(ModelSpec(model), lean, group, calls, lambda layer: None, patches)
            assert layers and not reasons, reasons
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="alst.memory_lean_layer")  # a layer on the ordinary path
            loss = model(**batch, use_cache=False).loss
        loss.backward()
    assert patches.journal == [] and state_of(model) == before
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    if group is not None:
        for grad in grads.values():
            dist.all_reduce(grad, group=group)
            grad /= sp_size
    return loss.item(), grads


def split_and_whole(
    config: Any,
    length: int,
    rows: int = 1,
    sp_size: int = 2,
    multiple: int = 0,
    padding: int = 0,
    lean: MemoryLeanConfig | None = None,
    core: str = "",
) -> tuple[float, dict[str, float]]:
    """Relative error of the split run's loss, and of each gradient, against the whole run's.

    The first row ends with ``padding`` tokens that its mask hides.
    """
    batch = family_batch(length, rows)
    if padding:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -padding:] = 0
        batch["labels"][0, -padding:] = -100
    whole_loss, whole = step_in_fp64(config, batch)
    groups = [dist.new_group(list(range(first, first + sp_size))) for first in range(0, dist.get_world_size(), sp_size)]
    loss, grads = step_in_fp64(config, batch, groups[dist.get_rank() // sp_size], multiple, lean, core)
    # A rank's batch may leave an expert without a token, and its gradient None.
    assert grads.keys() == whole.keys()
    worst = {name: float((grads[name] - true).norm() / true.norm()) for name, true in whole.items() if true.norm()}
    return abs(loss - whole_loss) / whole_loss, worst


def proved(model: torch.nn.Module) -> str:
    """What ``prove`` says of a model that all ranks are to share; one rank of them."""
    groups = build_groups(dist.get_world_size(), build_control_group())
    try:
        return verify_model(ModelSpec(model), groups)
    finally:
        groups.destroy()
