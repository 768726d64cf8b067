"""The story of a call of ``deepspeed.initialize``, in the order of the data's way.

    ds_config["alst"] -> typed config -> checks (world, model) -> process groups -> loader -> model patches -> engine

The only place where toggles are read.
"""

import copy
from collections.abc import Callable
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule

from deepspeed_alst.batch_keys import check_batch_keys
from deepspeed_alst.compatibility import check_features
from deepspeed_alst.config import SAME_ON_ALL_RANKS, AlstConfig, check_heads, check_world, parse
from deepspeed_alst.core.copying import with_plain_copies
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.deepspeed_values import check_numbers, idle_checkpointing, zero_stage
from deepspeed_alst.engine.buckets import reduction_keys
from deepspeed_alst.engine.checkpoint import install_checkpoints
from deepspeed_alst.engine.environment import check_build_lock, check_deepspeed, use_expandable_segments
from deepspeed_alst.engine.leaves import Leaves
from deepspeed_alst.engine.metrics import install_metrics
from deepspeed_alst.engine.offload import Planner
from deepspeed_alst.engine.probe import install_probe
from deepspeed_alst.engine.recipes import adopt, is_upstreams, prepare_adoption, with_upstreams_size
from deepspeed_alst.engine.reduction import install_reduction, reduction_of
from deepspeed_alst.engine.report import print_report, reduction_rows, report_rows, warn_rank_0
from deepspeed_alst.engine.session import Session
from deepspeed_alst.engine.start_check import install_model_check
from deepspeed_alst.engine.wrap import close_at_destroy
from deepspeed_alst.errors import AlstError, ConfigError
from deepspeed_alst.kernels.registry import load_tile_ops
from deepspeed_alst.mark import take
from deepspeed_alst.models.batch_guard import guard_batches, plan_batches
from deepspeed_alst.models.calls import Calls
from deepspeed_alst.models.cores import keeps_documents_apart, starts_at_lowest
from deepspeed_alst.models.experts import call_together, router_classes
from deepspeed_alst.models.families import check_model
from deepspeed_alst.models.fused import fuse_norms_and_rope
from deepspeed_alst.models.liger import LigerUse, use_liger
from deepspeed_alst.models.liger_loss import use_own_loss
from deepspeed_alst.models.patches import patch_model
from deepspeed_alst.models.probe import prove
from deepspeed_alst.models.tiled_loss import replace_whole_loss, tile_loss
from deepspeed_alst.models.tiles import tile_mlps
from deepspeed_alst.models.wrapped import vocabulary_of
from deepspeed_alst.ops.sum_pieces import load_sum_pieces
from deepspeed_alst.parallel.agreement import check_alike, raise_together
from deepspeed_alst.parallel.groups import SequenceGroups, build_control_group, build_groups
from deepspeed_alst.parallel.mpu import UlyssesMpu, installed

DeepSpeedInitialize = Callable[..., tuple[Any, Any, Any, Any]]


def initialize(
    original: DeepSpeedInitialize, arguments: dict[str, Any], ds_config: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for a ds_config that asks for this package.

    Args:
        original: DeepSpeed's own function.
        arguments: the caller's arguments, by name.
        ds_config: the configuration among them, as a dict.

    Returns:
        What DeepSpeed returns: engine, optimizer, training loader (sharded), learning-rate scheduler.

    Raises:
        AlstError: on all ranks, whichever of them saw the reason, and before any weight has changed.
    """
    check_deepspeed()
    adopted = arguments.get("mpu") if is_upstreams(arguments.get("mpu")) else None
    if adopted is not None:  # a program written for DeepSpeed's own ALST
        ds_config = with_upstreams_size(ds_config, adopted)
    config, stage, allocator = _read(ds_config)
    if config.sequence_parallel_size == 1:
        return _initialize_whole(original, arguments, stage, config, allocator)
    _check_arguments(arguments, ds_config)
    # From here on ranks stop together: one that left at once would take the rendezvous away from those still in it.
    control_group = _start(arguments, ds_config)
    raise_together(_error_in(arguments.get("model"), config, ds_config), control_group)
    with PatchSet().rollback_on_error() as patches:
        groups = build_groups(config.sequence_parallel_size, control_group)
        patches.callback(groups.destroy)
        session = _session(arguments["model"], config, groups, patches)
        original = with_plain_copies(original, arguments["model"], patches)
        attention, tiles, planner = _prepare_model(arguments["model"], session, stage, adopted, patches)
        passed, bucket = _deepspeed_arguments(arguments, ds_config, config, session)
        with installed(session.mpu):
            engine, optimizer, _, scheduler = original(**passed)
        session.attach(engine)
        parts = tiles + _make_room(planner, engine, control_group, patches)
        parts += _reduce(engine, config, bucket, patches)
        if adopted is not None:
            adopt(engine, session, adopted, patches)
        install_metrics(engine, patches)
        session.split_whole_batches(engine)
        if arguments.get("training_data") is not None:
            engine.training_dataloader = engine.deepspeed_io(arguments["training_data"])
        session.probe = install_probe(engine, groups, reduction_of(config).dtype, patches)
        install_model_check(engine, patches)
        print_report(report_rows(config, groups, engine, attention, parts, allocator, adopted is not None))
    return engine, optimizer, engine.training_dataloader, scheduler


def _read(ds_config: dict[str, Any]) -> tuple[AlstConfig, int, str]:
    """This package's keys, the stage of ZeRO and what was done to the allocator, with DeepSpeed's numbers checked."""
    config, stage = parse(ds_config), zero_stage(ds_config)
    check_numbers(ds_config)
    warn_rank_0(idle_checkpointing(ds_config))
    return config, stage, use_expandable_segments(config)


def _initialize_whole(
    original: DeepSpeedInitialize,
    arguments: dict[str, Any],
    stage: int,
    config: AlstConfig,
    allocator: str,
) -> Any:
    """Without sequence parallelism: DeepSpeed's own call, with the tiles that are asked for, and a report."""
    with PatchSet().rollback_on_error() as patches:
        original = with_plain_copies(original, arguments["model"], patches)
        tiles = _tile(arguments.get("model"), config, stage, Calls(), False, None, patches)
        if config.tiled_loss() is not None:
            replace_whole_loss(arguments["model"], patches)
        planner = _keep(arguments.get("model"), config, patches)
        if planner is not None:
            plan_batches(arguments["model"], planner, patches)
        results = original(**arguments)
        install_checkpoints(results[0])
        kept = _make_room_together(planner, results[0], patches)
        install_metrics(results[0], patches)
        rows = [
            ("sequence", "whole on every rank: sequence_parallel_size is 1"),
            *tiles,
            *kept,
            ("reduction", "DeepSpeed's: alst.reduction counts where sequence_parallel_size is above 1"),
            ("allocator", allocator),
        ]
        print_report(rows)
        close_at_destroy(results[0], patches)
    return results


def _tile(
    model: Any, config: AlstConfig, stage: int, calls: Calls, adopted: bool, group: Any, patches: PatchSet
) -> list[tuple[str, str]]:
    """Put Liger's kernels on, and into tiles what the config says; returns rows of the report."""
    take(model, patches)
    load_tile_ops(get_accelerator().device_name())  # a build takes up to a minute, which is not a step's
    liger = use_liger(model, config, get_accelerator().device_name(), group, patches)
    mlp, loss = config.alst.tiled_mlp_compute, config.tiled_loss()
    if adopted and config.alst.tiled_logits_loss == "auto":
        loss = None  # such a program may make its own loss of the logits
    if loss is not None and loss.backend == "auto" and liger.makes_loss:
        loss = loss.model_copy(update={"backend": "liger"})
    if loss is not None or config.sequence_parallel_size > 1:
        use_own_loss(model, patches)
    leaf = Leaves(model, stage, patches)
    call_together(model, stage, leaf, patches)
    fused_words = fuse_norms_and_rope(model, patches) if _fuses(config, liger) else "the model's own"
    mlp_words = "whole" if mlp is None else tile_mlps(model, mlp, leaf, patches, calls)
    loss_words = "whole" if loss is None else tile_loss(model, loss, calls, leaf, patches)
    return [
        ("liger", liger.words),
        ("norms, rotary", fused_words),
        ("tiled MLP", mlp_words),
        ("tiled loss", loss_words),
    ]


def _fuses(config: AlstConfig, liger: LigerUse) -> bool:
    """Whether norms and rotary embedding run this package's ops: on a GPU, where Liger's are neither there nor off."""
    return config.alst.liger_kernel == "auto" and not liger.patched and get_accelerator().device_name() == "cuda"


def _keep(model: Any, config: AlstConfig, patches: PatchSet) -> Planner | None:
    """Have a model's layers keep what the config says for the backward; None where nothing is asked for."""
    wanted = config.alst.save_attention_output
    if config.alst.activation_checkpoint_cpu_offload is None and wanted is not True:
        return None
    return Planner(model, config, patches)


def _make_room_together(planner: Planner | None, engine: Any, patches: PatchSet) -> list[tuple[str, str]]:
    """``_make_room`` where ranks have no group for agreements: one for this alone."""
    group = None if planner is None else build_control_group()
    rows = _make_room(planner, engine, group, patches)
    if group is not None:
        dist.destroy_process_group(group)
    return rows


def _make_room(planner: Planner | None, engine: Any, group: Any, patches: PatchSet) -> list[tuple[str, str]]:
    """Room off the device for what is kept; returns rows of the report."""
    if planner is None:
        return [("offload", "off")]
    error = None
    try:
        planner.attach(engine, patches)
    except AlstError as raised:
        error = raised
    raise_together(error, group)
    return planner.words()


def _session(model: Any, config: AlstConfig, groups: SequenceGroups, patches: PatchSet) -> Session:
    packing, marks_padding = keeps_documents_apart(model), bool(router_classes(model))
    mpu, by_lowest = UlyssesMpu(groups), starts_at_lowest(model)
    return Session(config, groups, mpu, packing, by_lowest, marks_padding, vocabulary_of(model), patches)


def _prepare_model(
    model: Any, session: Session, stage: int, adopted: Any, patches: PatchSet
) -> tuple[str, list[tuple[str, str]], Planner | None]:
    """Patch the model before its engine is built; returns what its attention is, in words, and the tiles' rows."""
    proof, group = prove(model, session.groups, adopted is not None), session.groups.control_group
    if adopted is not None:
        prepare_adoption(patches)
    attention = patch_model(model, session.groups.sp_group, patches, session.calls, whole_loss=adopted is None)
    planner = _keep(model, session.config, patches)
    guard_batches(model, session.groups, session.calls, patches, planner)
    tiles = _tile(model, session.config, stage, session.calls, adopted is not None, group, patches)
    return attention, [*([("model", proof)] if proof else []), *tiles], planner


def _start(arguments: dict[str, Any], ds_config: dict[str, Any]) -> Any:
    """Make the processes' rendezvous early; returns all ranks' group. ConfigError where ds_configs differ."""
    check_build_lock()
    deepspeed.comm.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        **{name: arguments[name] for name in ("distributed_port", "dist_init_required") if name in arguments},
    )
    group = build_control_group()
    check_alike({key: ds_config.get(key) for key in SAME_ON_ALL_RANKS}, group)
    return group


def _check_arguments(arguments: dict[str, Any], ds_config: dict[str, Any]) -> None:
    """Refuse what the call brings, in the ds_config and beside it, and sequence parallelism cannot use."""
    check_features(ds_config)
    problems = []
    if arguments.get("mpu") is not None and not is_upstreams(arguments["mpu"]):
        problems.append("mpu: sequence_parallel_size makes its own process groups; leave mpu out, or the key")
    if arguments.get("mesh_param") is not None:
        problems.append("mesh_param: sequence_parallel_size makes process groups of its own; leave it out")
    if isinstance(arguments.get("model"), PipelineModule):
        problems.append("model: a PipelineModule has no sequence dimension that could be split; use ZeRO")
    if problems:
        raise ConfigError("\n".join(problems))


def _error_in(model: Any, config: AlstConfig, ds_config: dict[str, Any]) -> AlstError | None:
    try:
        world_size = dist.get_world_size()
        facts = check_model(model)
        heads = [(facts.num_heads, facts.num_kv_heads, "attention")] if facts.num_heads and facts.num_kv_heads else []
        heads += [(*each, "scan") for each in sorted(facts.linear_heads)]
        check_world(config, world_size, heads)
        check_batch_keys(ds_config, config.sequence_parallel_size, world_size)
        for each in heads:
            check_heads(config, *each, world_size)
    except AlstError as error:
        return error
    return None


def _reduce(engine: Any, config: AlstConfig, bucket: str, patches: PatchSet) -> list[tuple[str, str]]:
    """Put our reduction in the place of the engine's; returns rows of the report."""
    reduction = reduction_of(config)
    adder = load_sum_pieces(get_accelerator().device_name())
    path = install_reduction(engine, reduction, patches)
    engine.alst.watch_gradients(engine)
    engine.alst.reduction_bytes = path.bytes_sent(engine)
    return reduction_rows(engine, reduction, path, adder, bucket)


def _deepspeed_arguments(
    arguments: dict[str, Any], ds_config: dict[str, Any], config: AlstConfig, session: Session
) -> tuple[dict[str, Any], str]:
    """The caller's arguments with our mpu and our form of the ds_config; and whose its bucket size is, in words."""
    ours, bucket = reduction_keys(ds_config, config, arguments["model"], session.groups.control_group)
    passed = {name: value for name, value in arguments.items() if name not in ("config_params", "training_data")}
    if arguments.get("config") is None and arguments.get("config_params") is None:
        # The configuration came in args. DeepSpeed refuses two, so `ours` takes its place there.
        args = copy.copy(arguments["args"])
        args.deepspeed_config, args.deepscale_config = ours, None
        return {**passed, "args": args, "mpu": session.mpu}, bucket
    return {**passed, "config": ours, "mpu": session.mpu}, bucket
