"""Hooks of DeepSpeed, transformers and accelerate: each loads the package only if the ds_config enables it.

They are installed in every process that imports these libraries, so they contain little beyond that check.
"""

import inspect
import json
import os
import sys
from types import ModuleType
from typing import Any

from deepspeed_alst.config.config_file import OWN_KEYS, config_on_command_line, find_config, ignored, is_wanted
from deepspeed_alst.core.patching import OWNED, wrap_once


def hook_initialize(deepspeed: ModuleType) -> None:
    """Wrap ``deepspeed.initialize``; a second call does nothing."""
    wrap_once(deepspeed, "initialize", _initialize)
    if is_wanted(_command_line_config()):
        # DeepSpeed builds its CPU op in init_distributed, which zero.Init or the program may call before initialize.
        for holder in (deepspeed, deepspeed.comm, deepspeed.zero.partition_parameters):
            wrap_once(holder, "init_distributed", _init_distributed)


def _initialize(original, *args, **kwargs):
    # DeepSpeed rejects a call that does not match the signature.
    try:
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
    except TypeError:
        return original(*args, **kwargs)
    _stop_loading_sharded()
    owners = getattr(arguments.get("model"), "__dict__", {}).get(OWNED)
    engine = owners[0]() if owners else None
    if engine is not None and engine.client_optimizer is None and not engine.optimizer_name():
        engine.destroy()  # TRL's, which computes a reference ahead with the model that it then trains
    elif owners is not None:
        from deepspeed_alst.errors import SetupError

        raise SetupError(
            "deepspeed.initialize: another engine has patched this model for sequence parallelism or tiling. Call "
            "destroy() of that engine first."
        )
    ds_config, mpu, mesh = find_config(arguments), arguments.get("mpu"), arguments.get("mesh_param")
    if not is_wanted(ds_config, mpu, mesh):
        if ds_config is not None and mpu is None and not mesh and (lines := ignored(ds_config)):
            # On every rank, since each has its own ds_config.
            print(f"deepspeed_alst: not enabled by the ds_config. {' '.join(lines)}", file=sys.stderr)
        return original(*args, **kwargs)
    from deepspeed_alst.initialize import initialize as alst_initialize

    return alst_initialize(original, dict(arguments), ds_config)


def _init_distributed(original, *args, **kwargs):
    from deepspeed_alst.environment import check_build_lock

    check_build_lock()
    return original(*args, **kwargs)


def _command_line_config() -> dict[str, Any]:
    """Return the ds_config of the command line; empty if none can be read."""
    return find_config({"config": config_on_command_line(sys.argv)}) or {}


def load_sharded_under_zero3(integration: ModuleType) -> None:
    """Make transformers load models sharded in a plain ZeRO-3 loop that does not request it.

    The model is built before ``deepspeed.initialize`` is called, so the config is looked up on the command line. A
    config with "auto" outside the alst block belongs to the HF Trainer, which registers its own.
    """
    ds_config = _command_line_config()
    zero = ds_config.get("zero_optimization") if is_wanted(ds_config) else None
    trainers = '"auto"' in json.dumps({key: value for key, value in ds_config.items() if key not in OWN_KEYS})
    if not isinstance(zero, dict) or zero.get("stage") != 3 or trainers or integration.is_deepspeed_zero3_enabled():
        return
    # transformers holds a weak reference.
    integration.kept_by_deepspeed_alst = integration.HfDeepSpeedConfig(ds_config)
    if os.environ.get("RANK", "0") == "0":
        print(
            "deepspeed_alst: from_pretrained shards models (ZeRO 3) until deepspeed.initialize is called; load other "
            "models, such as a teacher, after it",
            file=sys.stderr,
        )


def _stop_loading_sharded() -> None:
    """Stop sharded loading: models that the process loads after deepspeed.initialize stay unsharded."""
    integration = sys.modules.get("transformers.integrations.deepspeed")
    if hasattr(integration, "kept_by_deepspeed_alst"):
        del integration.kept_by_deepspeed_alst


def hook_trainer_config(integration: ModuleType) -> None:
    """Make the HF Trainer's ``"auto"`` batch keys count micro-steps if sequences are sharded over ranks."""
    wrap_once(integration.HfTrainerDeepSpeedConfig, "trainer_config_process", _trainer_config_process)


def _trainer_config_process(original, self, args, *rest, **kwargs):
    if not _splits_sequences(self.config, getattr(args, "parallelism_config", None)):
        return original(self, args, *rest, **kwargs)
    from deepspeed_alst.integrations.hf_trainer import fill_batch_keys

    return fill_batch_keys(original, self, args, *rest, **kwargs)


def hook_accelerate_config(module: ModuleType) -> None:
    """Hide the alst block from accelerate, which raises on any "auto" that it has no value for."""
    wrap_once(module.DeepSpeedPlugin, "deepspeed_config_process", _deepspeed_config_process)


def _deepspeed_config_process(original, self, prefix="", mismatches=None, config=None, **kwargs):
    if config is None and any(key in self.deepspeed_config for key in OWN_KEYS):
        config = {key: value for key, value in self.deepspeed_config.items() if key not in OWN_KEYS}
    return original(self, prefix=prefix, mismatches=mismatches, config=config, **kwargs)


def hook_accelerator(module: ModuleType) -> None:
    """Make the engine split batches of loaders that accelerate prepares, except the HF Trainer's."""
    wrap_once(module.Accelerator, "prepare_data_loader", _prepare_data_loader)
    wrap_once(module.Accelerator, "_prepare_deepspeed", _prepare_deepspeed)


def _prepare_data_loader(prepare, self, data_loader, *args, **kwargs):
    loader, sp_size = prepare(self, data_loader, *args, **kwargs), _sp_size_of(self)
    if sp_size == 1 or hasattr(loader, "alst_whole"):
        return loader
    from deepspeed_alst.data.loader import PreparedLoader

    return PreparedLoader(loader, self, sp_size)


def _prepare_deepspeed(build, self, *args):
    if _sp_size_of(self) > 1 and self.deepspeed_plugin.deepspeed_config.get("train_batch_size") == "auto":
        # accelerate would multiply by all ranks, although the ranks of a sequence share their samples.
        del self.deepspeed_plugin.deepspeed_config["train_batch_size"]
    result = build(self, *args)
    session = getattr(getattr(self.deepspeed_engine_wrapped, "engine", None), "alst", None)
    if session is not None and _sp_size_of(self) > 1:
        session.takes_whole = True
    return result


def _sp_size_of(accelerator: Any) -> int:
    """Return the SP degree of an Accelerator's loaders; the HF Trainer shards its batches elsewhere."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    is_trainers = plugin is not None and type(plugin.hf_ds_config).__name__ == "HfTrainerDeepSpeedConfig"
    if is_trainers or not _accelerator_splits(accelerator):
        return 1
    return int(plugin.deepspeed_config["sequence_parallel_size"])


def hook_trainer(module: ModuleType) -> None:
    """Make the HF Trainer's steps run on shards, and give its evaluation logits, also at SP 1."""
    wrap_once(module.Trainer, "training_step", _training_step)
    wrap_once(module.Trainer, "evaluation_loop", _evaluation_loop)
    wrap_once(module.Trainer, "create_accelerator_and_postprocess", _create_accelerator)


def _training_step(train, self, model, inputs, *args, **kwargs):
    if not (hasattr(model, "alst") and _accelerator_splits(self.accelerator)):
        return train(self, model, inputs, *args, **kwargs)
    from deepspeed_alst.integrations import hf_trainer

    return hf_trainer.training_step(train, self, model, inputs, *args, **kwargs)


def _evaluation_loop(evaluate, self, *args, **kwargs):
    if not is_wanted(_ds_config_of(self.accelerator)):
        return evaluate(self, *args, **kwargs)
    from deepspeed_alst.integrations.hf_predictions import evaluation

    with evaluation(self):
        return evaluate(self, *args, **kwargs)


def _create_accelerator(create, self):
    create(self)
    if _accelerator_splits(self.accelerator):
        # accelerate uses DeepSpeed's number anyway, but warns if the two differ.
        steps = _ds_config_of(self.accelerator).get("gradient_accumulation_steps")
        if type(steps) is int:
            self.accelerator.gradient_accumulation_steps = steps


def _ds_config_of(accelerator: Any) -> dict[str, Any]:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return {} if plugin is None else plugin.deepspeed_config


def _accelerator_splits(accelerator: Any) -> bool:
    return _splits_sequences(_ds_config_of(accelerator), getattr(accelerator, "parallelism_config", None))


def _splits_sequences(ds_config: dict[str, Any], parallelism: Any) -> bool:
    """Return True if a ds_config shards sequences, and accelerate's parallelism does not."""
    return (
        is_wanted(ds_config)
        and ds_config.get("sequence_parallel_size", 1) != 1
        and not (parallelism is not None and parallelism.sp_enabled)
    )
