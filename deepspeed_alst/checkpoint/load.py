"""``load_checkpoint`` of an engine on any number of ranks, in DeepSpeed's format.

ZeRO shards over all ranks, so another SP degree on as many ranks needs no conversion. On another number of ranks
DeepSpeed loads universal checkpoints only: rank 0 makes one next to the given checkpoint. All ranks inspect the files
before any rank loads: either all load, or none does.
"""

import inspect
import re
import zipfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT, PARAM_SHAPES
from deepspeed.runtime import engine as ds_engine
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_alst.checkpoint.save import STAMP, check_same, latest_tag, parameter_order
from deepspeed_alst.checkpoint.universal import convert_together, is_universal, naming, read, restore_the_rest
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import agree, gather_objects
from deepspeed_alst.errors import CheckpointError

_RANK_IN_NAME = re.compile(r"zero_pp_rank_(\d+)_mp_rank")

_Stamps = Mapping[str, dict[str, Any] | None]  # by file name; None if it was saved without this package


def takes_any_world_size(engine: Any) -> bool:
    """Return False for an engine that shards over more than ZeRO: pipeline, tensor or expert parallel."""
    return not (isinstance(engine, PipelineEngine) or engine.has_moe_layers or engine.mp_world_size != 1)


def load_on_any_world_size(engine: Any, load: Callable[..., Any], call: inspect.BoundArguments, group: Any) -> Any:
    """Load by DeepSpeed's ``load``, after a conversion if the checkpoint is of another world size.

    Raises:
        CheckpointError: on all ranks, if one cannot load it or sees other files.
    """
    given = call.arguments
    load_dir = Path(given["load_dir"])
    with agree(group, CheckpointError, f"{load_dir} cannot be loaded"):
        seen, stamps = _inspect(engine, load_dir, given)
    check_same(f"{load_dir} cannot be loaded", seen, group)
    if seen["tag"] is None:  # as in DeepSpeed
        return load(*call.args, **call.kwargs)
    folder = load_dir / seen["tag"]
    if not engine.use_node_local_storage():
        _check_one_save(folder, ChainMap(*gather_objects(stamps, group)))
    if seen["converts"]:
        names = _optimizer_files(engine, folder, seen["world_size"])
        convert_together(_model_file(engine, folder), names, engine.seq_dp_world_size, group)
        folder = load_dir / f"{seen['tag']}_universal"
    universal = seen["universal"] or seen["converts"]
    given.update(load_dir=str(load_dir), tag=str(folder.relative_to(load_dir)))

    with agree(group, CheckpointError, f"{folder} cannot be loaded"):
        with PatchSet() as patches:
            patches.set(engine._config, "load_universal_checkpoint", universal)
            # DeepSpeed 0.19.8 reads the tag in `latest` where ZeRO 3 loads weights alone, whatever tag is asked for.
            patches.wrap(ds_engine, "get_fp32_state_dict_from_zero_checkpoint", lambda f: partial(f, tag=seen["tag"]))
            path, client_state = load(*call.args, **call.kwargs)
        if universal:
            restore_the_rest(engine, _model_file(engine, folder), _with_optimizer(given))
    if client_state is not None:
        client_state.pop(STAMP, None)
    return path, client_state


def _inspect(engine: Any, load_dir: Path, given: dict[str, Any]) -> tuple[dict[str, Any], _Stamps]:
    """Check that this rank can load the checkpoint; return its properties and the stamps of this rank's share."""
    tag = given["tag"]
    if tag is None:
        tag = latest_tag(load_dir, "latest_universal" if engine.load_universal_checkpoint() else "latest")
    if tag is None:
        return {"tag": None}, {}
    folder, with_optimizer = load_dir / str(tag), _with_optimizer(given)
    model_file = _model_file(engine, folder)
    if not folder.is_dir():
        there = sorted({each.parent.name for each in load_dir.glob("*/*_model_states.pt")})
        raise CheckpointError(f"{folder}: no such checkpoint; {load_dir} has {', '.join(there) or 'none'}")
    if not model_file.is_file():
        raise CheckpointError(
            f"{model_file} is missing: the checkpoint is incomplete, or was saved at another ZeRO stage; this engine "
            f"runs stage {engine.zero_optimization_stage()}"
        )
    state, universal = read(model_file), is_universal(folder)
    if engine.load_universal_checkpoint() and not universal:
        raise CheckpointError(f"checkpoint.load_universal=true: {folder} is not a universal checkpoint")
    zero, reads_shards = engine.zero_optimization(), with_optimizer or engine.zero_optimization_partition_weights()
    # Below ZeRO 3 one file holds all weights unsharded.
    converts = zero and not universal and reads_shards and state["dp_world_size"] != engine.seq_dp_world_size
    own = []
    if zero and not universal and not converts:
        # Only this rank reads these files: an error inside DeepSpeed's load would leave the other ranks waiting.
        own = [engine._get_ckpt_name(str(load_dir), tag)]
        own += [engine._get_zero_ckpt_name(str(load_dir), tag)] * with_optimizer
    stamps = _verify_share(folder, reads_shards, map(Path, own))
    if own and with_optimizer and OPTIMIZER_STATE_DICT not in read(Path(own[-1])):
        raise CheckpointError(f"{own[-1]} has no {OPTIMIZER_STATE_DICT}: resume from another checkpoint")
    by_place = not universal and not converts
    if with_optimizer and (by_place or (given["load_module_strict"] and given["custom_load_fn"] is None)):
        # DeepSpeed compares weights, on all ranks alike, but not the optimizer state.
        _check_same_weights(engine, state, folder, by_place)
    seen = {"tag": str(tag), "world_size": state["dp_world_size"], "universal": universal, "converts": converts}
    return seen, stamps


def _with_optimizer(given: dict[str, Any]) -> bool:
    return given["load_optimizer_states"] and not given["load_module_only"]


def _model_file(engine: Any, folder: Path) -> Path:
    """Return rank 0's model file, which every checkpoint has: weight names and, below ZeRO 3, the weights."""
    return Path(engine._get_ckpt_name(str(folder.parent), folder.name, pp_placeholder="0"))


def _verify_share(folder: Path, with_optimizer: bool, own: Iterable[Path]) -> _Stamps:
    """Verify a rank's own files and its share of the common files; return the stamps found."""
    files = [*folder.glob("*_model_states.pt"), *(folder / "zero").rglob("*.pt"), *own]
    files += folder.glob("*_optim_states.pt") if with_optimizer else ()
    stamps = {}
    for index, path in enumerate(sorted(set(files))):
        named = _RANK_IN_NAME.search(path.name)
        owner = int(named[1]) if named else index
        if owner % dist.get_world_size() != dist.get_rank():
            continue
        verify(path)
        if path.parent != folder:
            continue  # tensors of a universal checkpoint are identified by their path
        stamps[path.name] = stamp = read(path).get(STAMP)
        if stamp and named and stamp["rank"] != owner:
            raise CheckpointError(
                f"{path} was written by rank {stamp['rank']}, not {owner}: the files were mixed; copy them again"
            )
    return stamps


def verify(path: Path) -> None:
    """Compare a file with the checksums that torch.save stored in it; raise CheckpointError if it is damaged."""
    with naming(path), zipfile.ZipFile(path) as archive:
        # A program may disable torch.save's checksums.
        damaged = archive.testzip() if torch.serialization.get_crc32_options() else None
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum mismatch in {damaged}")


def _check_one_save(folder: Path, stamps: _Stamps) -> None:
    """Raise CheckpointError if files of several saves are mixed, as after an interrupted overwrite.

    Files of ranks beyond the last save's world size are skipped: they belong to an earlier save and are never read.
    """
    first = min(stamps, default="")
    kept = stamps.get(first) or {}
    for name, stamp in sorted(stamps.items()):
        named = _RANK_IN_NAME.search(name)
        if kept and named and int(named[1]) >= kept["world_size"]:
            continue
        if (stamp or {}).get("save") != kept.get("save"):
            raise CheckpointError(
                f"{folder}: {name} and {first} are not of the same save: the checkpoint was partly overwritten, or its "
                "files were mixed. Resume from another one"
            )


def _check_same_weights(engine: Any, state: Mapping[str, Any], folder: Path, ordered: bool) -> None:
    """Raise CheckpointError if the optimizer states are of weights with other names or shapes, or in another order.

    DeepSpeed assigns them by position; ``ordered`` is False for universal checkpoints, which assign them by name.
    """
    zero, saved = engine.zero_optimization(), state[PARAM_SHAPES]
    if zero and saved is None:
        raise CheckpointError(
            f"{folder} was saved without ZeRO, and this engine runs stage {engine.zero_optimization_stage()}: resume "
            "with stage 0"
        )
    saved = saved or (state.get(STAMP) or {}).get("order")
    ours = engine._get_zero_param_shapes() if zero else parameter_order(engine)
    if engine.optimizer is None or saved is None:
        return

    def described(groups: Any) -> Iterable[str]:
        for group, names in enumerate(groups):
            for i, name in enumerate(names):
                shape = f" {list(names[name])}" if zero else ""
                yield f"{name}{shape} at place {i} of group {group}" if ordered else f"{name}{shape}"

    lists = [described(saved), described(ours)]
    for there, here in zip_longest(*(lists if ordered else map(sorted, lists)), fillvalue="nothing"):
        if there != here:
            raise CheckpointError(
                f"{folder} is of another model, of other trained parameters, or its optimizer had the weights in "
                f"another order, by which DeepSpeed assigns their states: it has {there}, here is {here}. Give the "
                "optimizer the same parameters in the same order (a set has none), or load the weights alone: "
                "load_module_only=True"
            )


def _optimizer_files(engine: Any, folder: Path, world_size: int) -> list[Path]:
    """Return the optimizer files of all ranks that saved; raise CheckpointError if no rank can read all of them."""
    if engine.use_node_local_storage() or engine.zero_nvme_offload_optimizer():
        raise CheckpointError(
            f"{folder} was saved on {world_size} ranks and this run has {engine.seq_dp_world_size}: with "
            "checkpoint.use_node_local_storage or the optimizer on NVMe, no rank can read all files. Resume on "
            f"{world_size} ranks"
        )
    folders = str(folder.parent), folder.name
    return [
        Path(x) for x in engine._get_mp_rank_zero_checkpoint_names(*folders, 0, world_size, engine.bfloat16_enabled())
    ]
