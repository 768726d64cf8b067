"""Counter-based random numbers for dropout, router noise and skipped layers under sequence parallelism.

A mode (random_draws/draw_mode.py) wraps each forward of the outermost module, and each checkpointed layer.
"""

import functools
import re
from contextlib import ExitStack
from typing import Any

import torch

from deepspeed_alst.core.checkpoint_hook import checkpoint_hook_of
from deepspeed_alst.core.forward_context import Draws, ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import CountedDraws, Forward, run_checkpoint


def begin(draws: Draws, rows: int, tokens: int, rank: int, on_trial: bool) -> CountedDraws:
    """Return the random-number mode for a forward of ``[B, s]`` tokens; on trial all forwards draw the same."""
    return CountedDraws(Forward(draws.next_key(on_trial), draws.replica, rank, rows, tokens))


def count_draws(spec: ModelSpec, calls: ForwardContext, patches: PatchSet) -> None:
    """Make a transformers model, or a wrapper around one, draw its random numbers from counters."""
    model, base, draws, entered = spec.outer, spec.model, calls.draws, ExitStack()
    draws.are_counted = True
    states: list[torch.Tensor] = []

    @torch.compiler.disable
    def enter(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entered.close()
        states.clear()
        tokens = next((kwargs[key] for key in ("input_ids", "inputs_embeds") if kwargs.get(key) is not None), None)
        tokens = args[0] if tokens is None and args else tokens
        is_training = any(each.training for each in module.modules())
        if is_training and isinstance(tokens, torch.Tensor) and tokens.dim() > 1:
            if draws.sp_size > 1:
                _refuse_neftune(spec)
            rank = 0 if calls.whole else draws.sp_rank
            entered.enter_context(begin(draws, *tokens.shape[:2], rank, calls.checking))
            states[:] = random_states(base) if any(map(_is_compiled, model.modules())) else []

    @torch.compiler.disable
    def leave(*_: Any) -> None:
        entered.close()
        if states and not all(map(torch.equal, states, random_states(base))):
            raise UnsupportedModelError(
                f"{type(base).__name__}: compiled code has drawn random numbers from torch's generator (rand_like, "
                "randn_like), which differ from those of one sequence. Leave its layers out of torch.compile"
            )

    patches.hook(model, "forward_pre", enter, with_kwargs=True)
    patches.hook(model, "forward", leave, always_call=True)
    patches.callback(entered.close)
    for layer in spec.checkpointed_layers:
        checkpoint_hook_of(layer, patches).wrappers.append(
            lambda checkpoint: functools.partial(run_checkpoint, checkpoint)
        )


def without_dropout(config: Any, attention_only: bool = False, patches: PatchSet | None = None) -> Any:
    """Set a config's dropout and noise rates to 0, all or only attention's; return the config."""
    patches = patches or PatchSet()
    text_config = config.get_text_config()
    for name, rate in list(vars(text_config).items()):
        if is_dropout(name, rate, attention_only):
            patches.set(text_config, name, 0.0)
    return config


def is_dropout(name: str, rate: Any, of_attention: bool = False) -> bool:
    """Return True if a field of a config is a dropout or noise rate, all or only attention's."""
    return ("att" in name or not of_attention) and isinstance(rate, float) and bool(re.search("drop|jitter", name))


def zero_attention_dropout(model: torch.nn.Module, patches: PatchSet) -> None:
    """Set the dropout rates of a model's attention modules to 0: kernels draw for one rank's heads."""
    without_dropout(ModelSpec(model).config, True, patches)
    for module in model.modules():
        if "Attention" in type(module).__name__:
            for name, rate in list(vars(module).items()):
                if "drop" in name and isinstance(rate, float):
                    patches.set(module, name, 0.0)
            for child in module.children():
                if isinstance(child, torch.nn.Dropout):
                    patches.set(child, "p", 0.0)


def _is_compiled(module: torch.nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def random_states(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the RNG states that compiled code would advance: compilers lower some random ops themselves."""
    device = next(model.parameters()).device
    on_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *on_device]


def _refuse_neftune(spec: ModelSpec) -> None:
    alpha = getattr(spec.embeddings, "neftune_noise_alpha", None)
    if alpha is not None:
        raise UnsupportedModelError(
            f"neftune_noise_alpha={alpha}: NEFTune scales its noise by the sample length, and under sequence "
            "parallelism the embeddings get a padded shard; leave it out"
        )
