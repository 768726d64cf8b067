"""Steps of a ``deepspeed.initialize`` call, in data-flow order.

    ds_config["alst"] -> typed config -> checks (world, model) -> process groups -> loader -> model patches -> engine

Toggles are read here only.
"""

import contextlib
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
from deepspeed_alst.engine.alst_engine import EngineFeatures, extend
from deepspeed_alst.engine.buckets import reduction_keys
from deepspeed_alst.engine.environment import check_build_lock, check_deepspeed, use_expandable_segments
from deepspeed_alst.engine.leaves import Leaves
from deepspeed_alst.engine.metrics import metrics_of
from deepspeed_alst.engine.offload import Planner
from deepspeed_alst.engine.probe import Probe
from deepspeed_alst.engine.recipes import UpstreamProgram, is_upstreams, prepare_adoption, with_upstreams_size
from deepspeed_alst.engine.reduction import install_reduction, reduction_of
from deepspeed_alst.engine.report import SHARD_LOSS, WHOLE_LOSS, print_report, reduction_rows, report_rows, warn_rank_0
from deepspeed_alst.engine.session import Session
from deepspeed_alst.engine.start_check import ModelCheck
from deepspeed_alst.errors import AlstError, ConfigError
from deepspeed_alst.kernels.registry import load_tile_ops
from deepspeed_alst.mark import take
from deepspeed_alst.models.batch_guard import guard_batches, plan_batches
from deepspeed_alst.models.calls import Calls
from deepspeed_alst.models.cores import keeps_documents_apart, starts_at_lowest
from deepspeed_alst.models.experts import call_together, router_classes
from deepspeed_alst.models.families import check_model
from deepspeed_alst.models.fused import fuse_norms_and_rope
from deepspeed_alst.models.liger import LigerUse, use_liger, use_own_loss
from deepspeed_alst.models.patches import patch_model
from deepspeed_alst.models.probe import prove
from deepspeed_alst.models.tiled_loss import replace_whole_loss, tile_loss
from deepspeed_alst.models.tiles import tile_mlps
from deepspeed_alst.models.wrapped import vocabulary_of
from deepspeed_alst.ops.sum_pieces import load_sum_pieces
from deepspeed_alst.parallel.agreement import check_alike, raise_together
from deepspeed_alst.parallel.groups import build_control_group, build_groups, destroy_groups
from deepspeed_alst.parallel.mpu import UlyssesMpu, installed

DeepSpeedInitialize = Callable[..., tuple[Any, Any, Any, Any]]


def initialize(
    original: DeepSpeedInitialize, arguments: dict[str, Any], ds_config: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """Run ``deepspeed.initialize`` for a ds_config that enables this package.

    Args:
        original: DeepSpeed's own function.
        arguments: the caller's arguments, by name.
        ds_config: the config among them, as a dict.

    Returns:
        DeepSpeed's results: engine, optimizer, training loader (sharded), learning-rate scheduler.

    Raises:
        AlstError: on all ranks, whichever rank found the problem, and before any weight changes.
    """
    check_deepspeed()
    upstream = arguments.get("mpu") if is_upstreams(arguments.get("mpu")) else None
    if upstream is not None:  # a program written for DeepSpeed's own ALST
        ds_config = with_upstreams_size(ds_config, upstream)
    config, stage, allocator = _read(ds_config)
    if config.sequence_parallel_size > 1:
        _check_arguments(arguments, ds_config)
    # From here on ranks stop together: one that left at once would take the rendezvous away from those still in it.
    control_group = _start(arguments, ds_config)
    model, session = arguments["model"], None
    with PatchSet().rollback_on_error() as patches:
        patches.callback(destroy_groups, control_group)
        if config.sequence_parallel_size > 1:
            raise_together(_error_in(model, config, ds_config), control_group)
            session = _session(model, config, control_group, patches)
        build = with_plain_copies(original, model, patches)
        rows, planner = _prepare_model(model, config, session, stage, upstream, control_group, patches)
        passed, bucket = _deepspeed_arguments(arguments, ds_config, config, session)
        with installed(session.mpu) if session else contextlib.nullcontext():
            engine, optimizer, loader, scheduler = build(**passed)
        rows += _attach_room(planner, engine, control_group, patches)
        features = EngineFeatures(patches, control_group, session)
        if session is not None:
            rows += _attach_session(features, engine, config, bucket, upstream)
        features.metrics = metrics_of(engine)
        extend(engine, features)
        if session is not None and arguments.get("training_data") is not None:
            loader = engine.training_dataloader = engine.deepspeed_io(arguments["training_data"])
        print_report(report_rows(config, engine, session, rows, allocator, upstream is not None))
    return engine, optimizer, loader, scheduler


def _read(ds_config: dict[str, Any]) -> tuple[AlstConfig, int, str]:
    """Parse this package's keys and DeepSpeed's ZeRO stage, check DeepSpeed's numbers, and set the allocator."""
    config, stage = parse(ds_config), zero_stage(ds_config)
    check_numbers(ds_config)
    warn_rank_0(idle_checkpointing(ds_config))
    return config, stage, use_expandable_segments(config)


def _tile(
    model: Any, config: AlstConfig, stage: int, calls: Calls, adopted: bool, group: Any, patches: PatchSet
) -> list[tuple[str, str]]:
    """Apply Liger kernels and the configured tiles; return the rows of the report."""
    take(model, patches)
    load_tile_ops(get_accelerator().device_name())  # built outside of a step: it takes up to a minute
    liger = use_liger(model, config, get_accelerator().device_name(), group, patches)
    mlp, loss = config.alst.tiled_mlp_compute, config.tiled_loss()
    if adopted and config.alst.tiled_logits_loss == "auto":
        loss = None  # such a program may compute its own loss from the logits
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
    """Return True if this package's norm and rotary ops run: on a GPU, with Liger neither active nor off."""
    return config.alst.liger_kernel == "auto" and not liger.patched and get_accelerator().device_name() == "cuda"


def _plan_offload(model: Any, config: AlstConfig, patches: PatchSet) -> Planner | None:
    """Prepare a model's layers to keep or offload activations; None where nothing is asked for."""
    block = config.alst
    if block.activation_checkpoint_cpu_offload is None and block.save_attention_output is not True:
        return None
    return Planner(model, config, patches)


def _attach_room(planner: Planner | None, engine: Any, group: Any, patches: PatchSet) -> list[tuple[str, str]]:
    """Make room off the device for offloaded activations; return rows of the report."""
    if planner is None:
        return [("offload", "off")]
    error = None
    try:
        planner.attach(engine, patches)
    except AlstError as raised:
        error = raised
    raise_together(error, group)
    return planner.words()


def _session(model: Any, config: AlstConfig, control_group: Any, patches: PatchSet) -> Session:
    """Build the process groups, and the state of sequence parallelism on one engine."""
    groups = build_groups(config.sequence_parallel_size, control_group)
    patches.callback(groups.destroy)
    packing, marks_padding = keeps_documents_apart(model), bool(router_classes(model))
    mpu, by_lowest = UlyssesMpu(groups), starts_at_lowest(model)
    return Session(config, groups, mpu, packing, by_lowest, marks_padding, vocabulary_of(model), patches)


def _prepare_model(
    model: Any, config: AlstConfig, session: Session | None, stage: int, upstream: Any, group: Any, patches: PatchSet
) -> tuple[list[tuple[str, str]], Planner | None]:
    """Patch the model before its engine is built; return rows of the report, and what plans its offload."""
    rows: list[tuple[str, str]] = []
    if session is None:
        planner = _plan_offload(model, config, patches)
        if planner is not None:
            plan_batches(model, planner, patches)
        if config.tiled_loss() is not None:
            replace_whole_loss(model, patches)
    else:
        is_upstream = upstream is not None
        proof = prove(model, session.groups, is_upstream)
        if is_upstream:
            prepare_adoption(patches)
        rows += [
            ("attention", patch_model(model, session.groups.sp_group, patches, session.calls, not is_upstream)),
            ("loss", SHARD_LOSS if is_upstream else WHOLE_LOSS),
            *([("model", proof)] if proof else []),
        ]
        planner = _plan_offload(model, config, patches)
        guard_batches(model, session.groups, session.calls, patches, planner)
    calls = session.calls if session else Calls()
    return rows + _tile(model, config, stage, calls, upstream is not None, group, patches), planner


def _attach_session(
    features: EngineFeatures, engine: Any, config: AlstConfig, bucket: str, upstream: Any
) -> list[tuple[str, str]]:
    """Wire sequence parallelism to an engine that is built; return rows of the report."""
    session, patches, reduction = features.session, features.patches, reduction_of(config)
    assert session is not None
    session.attach(engine)
    adder = load_sum_pieces(get_accelerator().device_name())
    path = install_reduction(engine, reduction, patches)
    session.watch_gradients(engine)
    session.reduction_bytes = path.bytes_sent(engine)
    if upstream is not None:
        features.upstream = UpstreamProgram(engine, session, upstream, patches)
    features.gradient_check = Probe(engine, session.groups, reduction.dtype, patches)
    if config.alst.check_model and upstream is None:
        features.model_check = ModelCheck(engine)
    return reduction_rows(engine, reduction, path, adder, bucket)


def _start(arguments: dict[str, Any], ds_config: dict[str, Any]) -> Any:
    """Initialize torch.distributed early; return a group of all ranks. ConfigError if ds_configs differ."""
    check_build_lock()
    deepspeed.comm.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        **{name: arguments[name] for name in ("distributed_port", "dist_init_required") if name in arguments},
    )
    group = build_control_group()
    check_alike({key: ds_config.get(key) for key in SAME_ON_ALL_RANKS}, group)
    return group


def _check_arguments(arguments: dict[str, Any], ds_config: dict[str, Any]) -> None:
    """Raise ConfigError for arguments and keys that sequence parallelism cannot use."""
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


def _deepspeed_arguments(
    arguments: dict[str, Any], ds_config: dict[str, Any], config: AlstConfig, session: Session | None
) -> tuple[dict[str, Any], str]:
    """Return the arguments of DeepSpeed's call, with its mpu and ds_config, and a description of the bucket size."""
    if session is None:
        return arguments, ""
    ours, bucket = reduction_keys(ds_config, config, arguments["model"], session.groups.control_group)
    passed = {name: value for name, value in arguments.items() if name not in ("config_params", "training_data")}
    if arguments.get("config") is None and arguments.get("config_params") is None:
        # The config came in args. DeepSpeed rejects two, so `ours` replaces it there.
        args = copy.copy(arguments["args"])
        args.deepspeed_config, args.deepscale_config = ours, None
        return {**passed, "args": args, "mpu": session.mpu}, bucket
    return {**passed, "config": ours, "mpu": session.mpu}, bucket
