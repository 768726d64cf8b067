"""Before the engine is built: read and check the ds_config and the arguments, and start the ranks."""

import sys
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule

from deepspeed_alst.config.compatibility import check_batch_keys, check_features, check_world, zero_stage
from deepspeed_alst.config.config_file import TOP_KEYS
from deepspeed_alst.config.schema import AlstConfig, parse
from deepspeed_alst.core.feature import RunContext
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import agree, assert_same_on_all_ranks
from deepspeed_alst.distributed.mesh import build_control_group, destroy_groups
from deepspeed_alst.environment import check_build_lock, check_deepspeed, use_expandable_segments
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import shown
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves
from deepspeed_alst.verification.hf_support_checks import check_model

_MPU = "deepspeed.runtime.sequence_parallel.parallel_state_sp"
# Ranks with different values of these keys would deadlock or diverge.
_SAME_ON_ALL_RANKS = (
    *AlstConfig.model_fields,
    *TOP_KEYS,
    "zero_optimization",
    "data_types",
    "bf16",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def read_config(ds_config: dict[str, Any]) -> tuple[AlstConfig, int, str]:
    """Return this package's keys, the ZeRO stage and a description of the CUDA allocator, which is set."""
    check_deepspeed()
    config = parse(ds_config)
    return config, zero_stage(ds_config), use_expandable_segments(config)


def is_upstream_mpu(mpu: Any) -> bool:
    """Return True if an mpu is the module that DeepSpeed's ``register_with_transformers`` returns."""
    return mpu is not None and mpu is sys.modules.get(_MPU)


def upstream_mpu(arguments: dict[str, Any], ds_config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return DeepSpeed's own mpu if the program registered one, and the ds_config with its SP degree.

    Raises:
        ConfigError: the mpu's groups do not exist yet, or the ds_config has another degree.
    """
    mpu = arguments.get("mpu")
    if not is_upstream_mpu(mpu):
        return None, ds_config
    try:
        size = mpu.get_sequence_parallel_world_size()
    except AssertionError:
        raise ConfigError(
            "mpu: DeepSpeed's sequence-parallel groups do not exist yet; call "
            "UlyssesSPAttentionHF.register_with_transformers before deepspeed.initialize"
        ) from None
    given = ds_config.get("sequence_parallel_size", size)
    if given != size:
        raise ConfigError(
            f"sequence_parallel_size={shown(given)}: the mpu was registered with sequence_parallel_size={size}. Set "
            f"the key to {size}, or leave it out."
        )
    return mpu, {**ds_config, "sequence_parallel_size": size}


def check_arguments(arguments: dict[str, Any], ds_config: dict[str, Any]) -> None:
    """Raise ConfigError for arguments and keys that sequence parallelism cannot use."""
    check_features(ds_config)
    problems = []
    if arguments.get("mpu") is not None and not is_upstream_mpu(arguments["mpu"]):
        problems.append("mpu: sequence_parallel_size creates its own process groups; remove mpu, or the key")
    if arguments.get("mesh_param") is not None:
        problems.append("mesh_param: sequence_parallel_size creates its own process groups; remove it")
    if isinstance(arguments.get("model"), PipelineModule):
        problems.append("model: a PipelineModule has no sequence dimension to split; use ZeRO")
    if problems:
        raise ConfigError("\n".join(problems))


def start_ranks(arguments: dict[str, Any], ds_config: dict[str, Any], patches: PatchSet) -> Any:
    """Initialize torch.distributed early; return a gloo group of all ranks. ConfigError if ds_configs differ."""
    check_build_lock()
    deepspeed.comm.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        **{name: arguments[name] for name in ("distributed_port", "dist_init_required") if name in arguments},
    )
    group = build_control_group()
    patches.callback(destroy_groups, group)
    # At SP 1 only the degree must match: hosts may have different disks.
    sp_size = ds_config.get("sequence_parallel_size", 1)
    keys = {key: ds_config.get(key) if sp_size != 1 else None for key in _SAME_ON_ALL_RANKS}
    assert_same_on_all_ranks({**keys, "sequence_parallel_size": sp_size}, group)
    return group


def build_session(
    spec: ModelSpec, config: AlstConfig, ds_config: dict[str, Any], control_group: Any, patches: PatchSet
) -> Session:
    """Check model, world size and batch keys against the SP degree, and build the state of sequence parallelism.

    An error on one rank is raised on all.
    """
    with agree(control_group):
        world_size, heads = dist.get_world_size(), check_model(spec)
        check_world(config, world_size, heads)
        check_batch_keys(ds_config, config.sequence_parallel_size, world_size)
    return Session(spec, config, control_group, patches, heads)


def run_context(
    spec: ModelSpec,
    config: AlstConfig,
    stage: int,
    control_group: Any,
    session: Session | None,
    upstream: Any,
    patches: PatchSet,
) -> RunContext:
    """Return what features are told of a run; its fields are described there."""
    calls, leaves = session.calls if session else ForwardContext(), ZeRO3Leaves(spec.whole, stage, patches)
    return RunContext(spec, config, stage, control_group, session, upstream, calls, leaves)
