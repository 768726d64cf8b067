"""``save_checkpoint`` and ``load_checkpoint`` of an engine on any number of ranks, in DeepSpeed's format.

ZeRO shards over all ranks, so another SP degree on as many ranks needs no conversion. On another number of ranks
DeepSpeed loads universal checkpoints only: rank 0 makes one next to the given checkpoint.

All ranks inspect the files and agree on the result before any rank loads: either all ranks load, or none does.
"""

import functools
import inspect
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    OPTIMIZER_STATE_DICT,
)
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_alst.engine.checkpoint_files import STAMP, check_files, check_one_save, read, verify_share
from deepspeed_alst.engine.conversion import Source, convert_together
from deepspeed_alst.engine.same_model import check_same_model, check_same_order
from deepspeed_alst.engine.saving import latest_tag
from deepspeed_alst.engine.universal import as_universal, is_universal, restore_the_rest
from deepspeed_alst.errors import AlstError, CheckpointError
from deepspeed_alst.parallel.agreement import gather_objects, raise_together

_T = TypeVar("_T")


def takes_any_world_size(engine: Any) -> bool:
    """Return False for an engine that shards over more than ZeRO: pipeline, tensor or expert parallel."""
    return not (isinstance(engine, PipelineEngine) or engine.has_moe_layers or engine.mp_world_size != 1)


@dataclass(frozen=True)
class _Request:
    """Request of one ``load_checkpoint`` call."""

    load_dir: Path
    tag: str
    strict: bool
    """True if names and shapes of the checkpoint's weights must match the model's."""
    with_optimizer: bool


@dataclass(frozen=True)
class _Seen:
    """Properties of the checkpoint folder, as seen by one rank."""

    saved_world_size: int
    universal: bool


def load_on_any_world_size(engine: Any, load: Callable[..., Any], call: inspect.BoundArguments, group: Any) -> Any:
    """Load a checkpoint by DeepSpeed's ``load_checkpoint``; one of another world size is converted before.

    Args:
        engine: that loads it.
        load: DeepSpeed's own method.
        call: its arguments.
        group: all ranks over gloo.

    Raises:
        CheckpointError: on all ranks, whichever could not load it.
    """
    found = _look_together(engine, call.arguments, group)
    if found is None:
        return load(*call.args, **call.kwargs)
    request, seen = found
    if _needs_conversion(engine, request, seen):
        request = _converted(engine, request, seen, group)
        seen = _Seen(seen.saved_world_size, universal=True)
    call.arguments.update(load_dir=str(request.load_dir), tag=request.tag)
    return _load_together(engine, load, call, request, seen, group)


def _look_together(engine: Any, arguments: dict[str, Any], group: Any) -> tuple[_Request, _Seen] | None:
    """Return the agreed request and folder properties; None if no checkpoint is named or found, as in DeepSpeed.

    Raises:
        CheckpointError: on all ranks, if a rank cannot load it or ranks see different files.
    """
    load_dir = Path(arguments["load_dir"])
    request = _together(load_dir, lambda: _request(engine, load_dir, arguments), group)
    _check_same("checkpoints", load_dir, request and request.tag, group)
    if request is None:
        return None
    folder = load_dir / request.tag
    reads_optimizer = request.with_optimizer or engine.zero_optimization_partition_weights()
    share = functools.partial(verify_share, folder, reads_optimizer, dist.get_rank(), dist.get_world_size())
    stamps = ChainMap(*gather_objects(_together(folder, share, group), group))
    if not engine.use_node_local_storage():
        check_one_save(folder, stamps)
    seen = _together(folder, lambda: _look(engine, request), group)
    _check_same("files", folder, seen, group)
    return request, seen


def _together(path: Path, look: Callable[[], _T], group: Any) -> _T:
    """Run ``look`` on this rank; an error on one rank is raised on all. Collective."""
    error, result = None, None
    try:
        result = look()
    except AlstError as found:
        error = found
    except Exception as found:
        error = CheckpointError(f"{path} cannot be loaded: {found!r}")
        error.__cause__ = found
    raise_together(error, group)
    return cast(_T, result)


def _check_same(what: str, path: Path, seen: Any, group: Any) -> None:
    everyone = gather_objects(seen, group)
    if any(each != everyone[0] for each in everyone):
        views = ", ".join(f"rank {rank}: {each or 'nothing'}" for rank, each in enumerate(everyone))
        raise CheckpointError(
            f"{path}: the ranks ask for or see different {what} ({views}). Give all the same tag, in a folder that "
            "all share"
        )


def _request(engine: Any, load_dir: Path, arguments: dict[str, Any]) -> _Request | None:
    tag = arguments["tag"]
    tag = _latest_tag(engine, load_dir) if tag is None else str(tag)
    if tag is None:
        return None
    return _Request(
        load_dir,
        tag,
        strict=arguments["load_module_strict"] and arguments["custom_load_fn"] is None,
        with_optimizer=arguments["load_optimizer_states"] and not arguments["load_module_only"],
    )


def _latest_tag(engine: Any, load_dir: Path) -> str | None:
    return latest_tag(load_dir, "latest_universal" if engine.load_universal_checkpoint() else "latest")


def _look(engine: Any, request: _Request) -> _Seen:
    """Check that this rank can load the checkpoint, without reading a weight."""
    folder = request.load_dir / request.tag
    if not folder.is_dir():
        there = sorted(each.parent.name for each in request.load_dir.glob("*/*_model_states.pt"))
        known = f"; {request.load_dir} has {', '.join(dict.fromkeys(there))}" if there else ""
        raise CheckpointError(f"{folder}: no such checkpoint{known}")
    model_file = _model_file(engine, request)
    if not model_file.is_file():
        other = "below 3" if engine.zero_optimization_partition_weights() else "3"
        hint = f": it was saved at a ZeRO stage {other}, and this engine runs stage {engine.zero_optimization_stage()}"
        raise CheckpointError(
            f"{folder} has no {model_file.name}{hint if any(folder.glob('*_model_states.pt')) else ''}"
        )
    state = read(model_file)
    universal = is_universal(folder)
    if engine.load_universal_checkpoint() and not universal:
        raise CheckpointError(f"checkpoint.load_universal=true: {folder} is not a universal checkpoint")
    if request.strict and request.with_optimizer:
        # DeepSpeed compares weights, on all ranks alike, but not the optimizer state.
        check_same_model(engine, state, folder)
    saved_world_size = state["dp_world_size"]
    positional = not universal and saved_world_size == engine.seq_dp_world_size
    if positional and request.with_optimizer:
        check_same_order(engine, state, folder)
    if positional and engine.zero_optimization():
        # Only this rank reads these files: an error inside DeepSpeed's load would leave the other ranks waiting.
        own = [Path(engine._get_ckpt_name(str(request.load_dir), request.tag))]
        own += [Path(engine._get_zero_ckpt_name(str(request.load_dir), request.tag))] * request.with_optimizer
        check_files(own)
        if request.with_optimizer and OPTIMIZER_STATE_DICT not in read(own[-1]):
            raise CheckpointError(f"{own[-1]} holds no optimizer state of DeepSpeed's")
    return _Seen(saved_world_size, universal)


def _model_file(engine: Any, request: _Request) -> Path:
    """Return rank 0's model file, which every checkpoint has: weight names and, below ZeRO 3, the weights."""
    return Path(engine._get_ckpt_name(str(request.load_dir), request.tag, pp_placeholder="0"))


def _needs_conversion(engine: Any, request: _Request, seen: _Seen) -> bool:
    if seen.universal or not engine.zero_optimization() or seen.saved_world_size == engine.seq_dp_world_size:
        return False
    # Below ZeRO 3 one file holds all weights unsharded.
    return request.with_optimizer or engine.zero_optimization_partition_weights()


def _converted(engine: Any, request: _Request, seen: _Seen, group: Any) -> _Request:
    bf16 = engine.bfloat16_enabled()
    names = engine._get_mp_rank_zero_checkpoint_names(
        str(request.load_dir), request.tag, mp_rank=0, dp_world_size=seen.saved_world_size, bf16_mode=bf16
    )
    source = Source(request.load_dir, request.tag, tuple(map(Path, names)), engine.seq_dp_world_size)
    refusal = None
    if engine.use_node_local_storage() or engine.zero_nvme_offload_optimizer():
        refusal = CheckpointError(
            f"{source.folder} was saved on {seen.saved_world_size} ranks and this run has {source.world_size}: with "
            "checkpoint.use_node_local_storage or the optimizer on NVMe, no rank sees all its files. Resume on "
            f"{seen.saved_world_size} ranks"
        )
    raise_together(refusal, group)
    return _Request(request.load_dir, convert_together(source, group), request.strict, request.with_optimizer)


def _load_together(
    engine: Any, load: Callable[..., Any], arguments: Any, request: _Request, seen: _Seen, group: Any
) -> Any:
    def load_here() -> Any:
        with as_universal(engine, seen.universal):
            result = load(*arguments.args, **arguments.kwargs)
        if seen.universal:
            restore_the_rest(
                engine, request.load_dir / request.tag, _model_file(engine, request), request.with_optimizer
            )
        return result

    path, client_state = _together(request.load_dir / request.tag, load_here, group)
    if client_state is not None:
        client_state.pop(STAMP, None)
    return path, client_state
