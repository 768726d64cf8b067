"""The gate in front of ``deepspeed.initialize``: reads the config, and loads the package only if it asks for it.

Runs in every process that imports deepspeed or transformers, so it holds little but the question "is this config for
us?".
"""

import functools
import inspect
import json
import os
import sys
from types import ModuleType
from typing import Any

from deepspeed_alst.config_file import OWN_KEYS, config_on_command_line, find_config, is_wanted
from deepspeed_alst.mark import is_taken
from deepspeed_alst.near_misses import ignored

_MARK = "__deepspeed_alst__"


def hook_initialize(deepspeed: ModuleType) -> None:
    """Put the gate in front of ``deepspeed.initialize``; a second call does nothing."""
    original = deepspeed.initialize
    if hasattr(original, _MARK):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize(*args, **kwargs):
        # A call that does not fit the signature is DeepSpeed's to refuse.
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return original(*args, **kwargs)
        _stop_loading_sharded()
        if is_taken(arguments.get("model")):
            _refuse_a_second_engine()
        ds_config, mpu, mesh = find_config(arguments), arguments.get("mpu"), arguments.get("mesh_param")
        if not is_wanted(ds_config, mpu, mesh):
            if ds_config is not None and mpu is None and not mesh:
                _warn_of(ignored(ds_config))
            return original(*args, **kwargs)
        from deepspeed_alst.initialize import initialize as alst_initialize

        return alst_initialize(original, dict(arguments), ds_config)

    setattr(initialize, _MARK, original)
    deepspeed.initialize = initialize
    if is_wanted(_command_line_config()):
        _check_lock_at_start(deepspeed)


def _warn_of(lines: list[str]) -> None:
    """Print one line for all keys that do nothing; each rank for itself, as each has a ds_config of its own."""
    if lines:
        print(f"deepspeed_alst: the ds_config switches nothing on here; {' '.join(lines)}", file=sys.stderr)


def _refuse_a_second_engine() -> None:
    from deepspeed_alst.errors import SetupError

    raise SetupError(
        "deepspeed.initialize was given a model that an engine has changed (sequence parallelism or tiles): the second "
        "engine would have the first one's. Call destroy() of that engine first."
    )


def _check_lock_at_start(deepspeed: ModuleType) -> None:
    """DeepSpeed builds its CPU op where the ranks meet, which zero.Init or the program may do before initialize."""
    original = deepspeed.comm.init_distributed

    @functools.wraps(original)
    def init_distributed(*args, **kwargs):
        from deepspeed_alst.engine.environment import check_build_lock

        check_build_lock()
        return original(*args, **kwargs)

    setattr(init_distributed, _MARK, original)
    for holder in _holders(deepspeed):
        holder.init_distributed = init_distributed


def _holders(deepspeed: ModuleType) -> tuple[Any, ...]:
    """Where DeepSpeed looks ``init_distributed`` up; zero.Init has a name of its own for it."""
    return deepspeed, deepspeed.comm, deepspeed.zero.partition_parameters


def unhook_initialize(deepspeed: ModuleType) -> None:
    """Give ``deepspeed.initialize`` back as it was, and ``init_distributed`` where it was hooked too."""
    deepspeed.initialize = getattr(deepspeed.initialize, _MARK, deepspeed.initialize)
    for holder in _holders(deepspeed):
        holder.init_distributed = getattr(holder.init_distributed, _MARK, holder.init_distributed)


def _command_line_config() -> dict[str, Any]:
    """The ds_config of the command line; empty if there is none to read."""
    return find_config({"config": config_on_command_line(sys.argv)}) or {}


def load_sharded_under_zero3(integration: ModuleType) -> None:
    """Have transformers load models sharded, in a plain ZeRO-3 loop that does not ask for it.

    The model is built before ``deepspeed.initialize`` can say anything, so the config is looked up on the command line.
    A config with "auto" outside the alst block is the HF Trainer's, which makes its own.

    Args:
        integration: the module ``transformers.integrations.deepspeed``, which gets an attribute that keeps the config
            alive: transformers holds a weak reference.
    """
    ds_config = _command_line_config()
    zero = ds_config.get("zero_optimization") if is_wanted(ds_config) else None
    trainers = '"auto"' in json.dumps({key: value for key, value in ds_config.items() if key not in OWN_KEYS})
    if not isinstance(zero, dict) or zero.get("stage") != 3 or trainers or integration.is_deepspeed_zero3_enabled():
        return
    integration.kept_by_deepspeed_alst = integration.HfDeepSpeedConfig(ds_config)
    if os.environ.get("RANK", "0") == "0":
        print(
            "deepspeed_alst: from_pretrained loads models sharded (ZeRO 3) until deepspeed.initialize is called; load "
            "other models, such as a teacher, after it",
            file=sys.stderr,
        )


def hook_trainer_config(integration: ModuleType) -> None:
    """Have the HF Trainer's ``"auto"`` batch keys count micro-steps where the sequence is split over ranks.

    Args:
        integration: the module ``transformers.integrations.deepspeed``.
    """
    trainer_config = integration.HfTrainerDeepSpeedConfig
    original = trainer_config.trainer_config_process
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def trainer_config_process(self, args, *rest, **kwargs):
        if not _splits_sequences(self.config, getattr(args, "parallelism_config", None)):
            return original(self, args, *rest, **kwargs)
        from deepspeed_alst.models.trainer_config import fill_batch_keys

        return fill_batch_keys(original, self, args, *rest, **kwargs)

    setattr(trainer_config_process, _MARK, original)
    trainer_config.trainer_config_process = trainer_config_process


def hook_accelerate_config(module: ModuleType) -> None:
    """Have accelerate leave the alst block alone: any "auto" that it has no value for would be an error of its own.

    Args:
        module: ``accelerate.utils.dataclasses``.
    """
    plugin_class = module.DeepSpeedPlugin
    original = plugin_class.deepspeed_config_process
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def deepspeed_config_process(self, prefix="", mismatches=None, config=None, **kwargs):
        if config is None and any(key in self.deepspeed_config for key in OWN_KEYS):
            config = {key: value for key, value in self.deepspeed_config.items() if key not in OWN_KEYS}
        return original(self, prefix=prefix, mismatches=mismatches, config=config, **kwargs)

    setattr(deepspeed_config_process, _MARK, original)
    plugin_class.deepspeed_config_process = deepspeed_config_process


def hook_accelerator(module: ModuleType) -> None:
    """Have the engine split the batches of loaders that accelerate prepares; the HF Trainer's have their own plan.

    Args:
        module: ``accelerate.accelerator``.
    """
    from deepspeed_alst.data.prepared import hook_loaders

    if not hasattr(module.Accelerator.prepare_data_loader, _MARK):
        hook_loaders(module.Accelerator, _MARK, _splits_sequences)


def hook_trainer(module: ModuleType) -> None:
    """Have the HF Trainer's steps go over shards where its engine splits the sequence; others stay as they are.

    An evaluation gets logits where its program needs them, at SP 1 too.

    Args:
        module: ``transformers.trainer``.
    """
    trainer_class = module.Trainer
    train, evaluate = trainer_class.training_step, trainer_class.evaluation_loop
    create = trainer_class.create_accelerator_and_postprocess
    if hasattr(train, _MARK):
        return

    @functools.wraps(train)
    def training_step(self, model, inputs, *args, **kwargs):
        if not (hasattr(model, "alst") and _trainer_splits_sequences(self)):
            return train(self, model, inputs, *args, **kwargs)
        from deepspeed_alst.models import trainer

        return trainer.training_step(train, self, model, inputs, *args, **kwargs)

    @functools.wraps(evaluate)
    def evaluation_loop(self, *args, **kwargs):
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or not is_wanted(plugin.deepspeed_config):
            return evaluate(self, *args, **kwargs)
        from deepspeed_alst.models import trainer

        with trainer.evaluation(self):
            return evaluate(self, *args, **kwargs)

    @functools.wraps(create)
    def create_accelerator_and_postprocess(self):
        create(self)
        if _trainer_splits_sequences(self):
            # accelerate takes DeepSpeed's number in any case, but warns of two numbers.
            steps = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("gradient_accumulation_steps")
            if type(steps) is int:
                self.accelerator.gradient_accumulation_steps = steps

    for wrapper in (training_step, evaluation_loop, create_accelerator_and_postprocess):
        setattr(wrapper, _MARK, wrapper.__wrapped__)
        setattr(trainer_class, wrapper.__name__, wrapper)


def _trainer_splits_sequences(trainer: Any) -> bool:
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and _splits_sequences(
        plugin.deepspeed_config, getattr(accelerator, "parallelism_config", None)
    )


def _splits_sequences(ds_config: dict[str, Any], parallelism: Any) -> bool:
    """Whether the keys of a Trainer's ds_config split sequences, and not accelerate's parallelism."""
    return (
        is_wanted(ds_config)
        and ds_config.get("sequence_parallel_size", 1) != 1
        and not (parallelism is not None and parallelism.sp_enabled)
    )


def _stop_loading_sharded() -> None:
    """The model is loaded once deepspeed.initialize is called; others in the process are to stay whole."""
    integration = sys.modules.get("transformers.integrations.deepspeed")
    if hasattr(integration, "kept_by_deepspeed_alst"):
        del integration.kept_by_deepspeed_alst
