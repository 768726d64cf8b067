"""``deepspeed.initialize`` for a ds_config that turns features on: start the ranks, build, patch, attach, report."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.core.copying import with_plain_copies
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import OWNED, PatchSet
from deepspeed_alst.distributed.mesh import installed
from deepspeed_alst.engine import extend
from deepspeed_alst.features import features_of
from deepspeed_alst.grad_reduction.feature import deepspeed_arguments
from deepspeed_alst.report import print_report, report_rows
from deepspeed_alst.start import build_session, check_arguments, read_config, run_context, start_ranks, upstream_mpu

DeepSpeedInitialize = Callable[..., tuple[Any, Any, Any, Any]]


def initialize(
    original: DeepSpeedInitialize, arguments: dict[str, Any], ds_config: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """Run ``deepspeed.initialize`` for a ds_config that enables this package.

    Args:
        original: DeepSpeed's function.
        arguments: the caller's, by name.
        ds_config: of the arguments, as a dict.

    Returns:
        DeepSpeed's results: engine, optimizer, training loader (sharded), learning-rate scheduler.

    Raises:
        AlstError: on all ranks, whichever rank found the problem, and before any weight changes.
    """
    spec = ModelSpec(arguments.get("model"))
    upstream, ds_config = upstream_mpu(arguments, ds_config)
    config, stage, allocator = read_config(ds_config)
    if splits_sequences := config.sequence_parallel_size > 1:
        check_arguments(arguments, ds_config)
        spec = spec.split_part()
    elif not isinstance(spec.outer, torch.nn.Module):
        return original(**arguments)  # which refuses it
    with PatchSet().rollback_on_error() as patches:
        # From here on ranks fail together: an early exit would take the rendezvous from the other ranks.
        control_group = start_ranks(arguments, ds_config, patches)
        session = build_session(spec, config, ds_config, control_group, patches) if splits_sequences else None
        passed, bucket = deepspeed_arguments(arguments, ds_config, config, session)
        run = run_context(spec, config, stage, control_group, session, upstream, patches)
        features = features_of(run, bucket)

        build = with_plain_copies(original, spec.whole, patches)
        owners: list[weakref.ref[Any]] = []
        patches.set(spec.whole, OWNED, owners)
        for feature in features:
            feature.prepare_model(run, patches)
        with installed(session.mpu) if session else contextlib.nullcontext():
            engine, optimizer, loader, scheduler = build(**passed)
        extend(engine, patches, control_group, session)
        owners.append(weakref.ref(engine))
        for feature in features:
            feature.attach_engine(engine, run, patches)
        if splits_sequences and arguments.get("training_data") is not None:
            loader = engine.training_dataloader = engine.deepspeed_io(arguments["training_data"])
        print_report(report_rows(run, engine, features, allocator))
    return engine, optimizer, loader, scheduler
