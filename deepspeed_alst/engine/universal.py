"""Universal checkpoints, DeepSpeed's format for another number of ranks: detection and complete loading."""

import contextlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS, FROZEN_PARAM_SHAPES, PARAM_GROUPS, PARAM_SHAPES

from deepspeed_alst.engine.checkpoint_files import read


def is_universal(folder: Path) -> bool:
    """Return True if a folder is a complete universal checkpoint, by the files that the converter writes last."""
    return (folder / "zero" / "optimizer_state.pt").is_file() and any(folder.glob("*_model_states.pt"))


@contextlib.contextmanager
def as_universal(engine: Any, universal: bool) -> Iterator[None]:
    """Set the engine's ``checkpoint.load_universal`` for the duration of a call."""
    config = engine._config
    before, config.load_universal_checkpoint = config.load_universal_checkpoint, universal
    try:
        yield
    finally:
        config.load_universal_checkpoint = before


def restore_the_rest(engine: Any, folder: Path, model_file: Path, with_optimizer: bool) -> None:
    """Restore state that DeepSpeed 0.19.8 omits or mixes up in a universal checkpoint. Collective.

    DeepSpeed leaves frozen weights and buffers unchanged; at ZeRO 3 all parameter groups get the first one's settings
    and share its step count, which each of them advances.
    """
    state = read(model_file)
    trained = set().union(*state[PARAM_SHAPES])
    if engine.zero_optimization_partition_weights():
        _restore_frozen_shards(engine, folder, model_file)
        if with_optimizer:
            _restore_groups(engine.optimizer.optimizer, folder)
        named = engine.module.named_buffers()
    else:
        named = chain(engine.module.named_parameters(), engine.module.named_buffers())
    for name, x in named:
        if name in state["module"] and name not in trained:
            x.data.copy_(state["module"][name])


def _restore_groups(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    saved = read(folder / "zero" / "optimizer_state.pt")[PARAM_GROUPS]
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _restore_frozen_shards(engine: Any, folder: Path, model_file: Path) -> None:
    """Restore ZeRO 3's frozen weights from the shards that the ranks saved.

    All ranks open the files, so that a missing one stops all ranks; rank 0's values are used.
    """
    shapes = read(model_file)[FROZEN_PARAM_SHAPES] or {}
    frozen = [(name, param) for name, param in engine.module.named_parameters() if name in shapes]
    num_pieces = len(list(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt")))
    files = [folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(num_pieces)]
    pieces = [read(each)[FROZEN_PARAM_FRAGMENTS] for each in files] if frozen else []
    for name, param in frozen:
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            if dist.get_rank() == 0:
                whole = torch.cat([piece[name].flatten() for piece in pieces])
                param.data.copy_(whole[: param.numel()].view(shapes[name]))
