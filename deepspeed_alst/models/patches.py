"""What is changed in a transformers model for sequence parallelism; every change goes onto a stack that undoes it.

Nothing is changed outside the model but two entries under a name of the model's own, in transformers' attention and
mask interfaces: other models in the process keep theirs.
"""

import copy
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from deepspeed_alst.attention.ulysses import ulysses_attention
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.parallel.loss import IGNORED_LABEL, whole_sequence_loss

# Arguments of an attention call that change its result and that the all-to-all does not carry yet.
_UNVERIFIED_ARGUMENTS = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "head_mask")


@dataclass
class Calls:
    """How often the patched parts were reached in one forward."""

    attention: int = 0
    loss: int = 0


def patch_model(model: torch.nn.Module, group: Any, undo: ExitStack) -> str:
    """Give a model Ulysses attention and the loss of the whole sequence; returns what was done, in words.

    ``undo.close()`` takes both back.
    """
    calls = Calls()
    _own_config(model, undo)
    _register_attention(model, group, calls, undo)
    _replace_loss(model, group, calls, undo)
    _check_calls(model, calls, undo)
    return f"{type(model).__name__}: sdpa over {dist.get_world_size(group)} ranks, 2 all-to-alls per layer and pass"


def _check_calls(model: torch.nn.Module, calls: Calls, undo: ExitStack) -> None:
    """Make sure that a forward went through the patched parts: a subclass, or a library, may have replaced them."""

    def reset(module: torch.nn.Module, args: Any) -> None:
        calls.attention = calls.loss = 0

    def check(module: torch.nn.Module, args: Any, output: Any) -> None:
        if not calls.attention:
            raise UnsupportedModelError(
                f"{type(model).__name__} did not call transformers' attention interface: its attention sees only a "
                "shard of the sequence. Undo whatever replaced its attention (kernels, a subclass)."
            )
        if module.training and torch.is_grad_enabled() and getattr(output, "loss", None) is None and not calls.loss:
            raise UnsupportedModelError(
                f"{type(model).__name__} was trained on without labels: a loss made of its logits is the loss of a "
                "shard. Give the batch labels and use the loss that the model returns."
            )
        if getattr(output, "loss", None) is not None and not calls.loss:
            raise UnsupportedModelError(
                f"{type(model).__name__} made a loss without self.loss_function: it is the loss of a shard. Undo "
                "whatever replaced its forward (Liger's fused loss, a subclass)."
            )

    for handle in (model.register_forward_pre_hook(reset), model.register_forward_hook(check)):
        undo.callback(handle.remove)


def _own_config(model: torch.nn.Module, undo: ExitStack) -> None:
    """A config of the model's own: two models built from one config object share it, and only one is to change."""
    shared = model.config
    own = copy.deepcopy(shared)
    holders = [module for module in model.modules() if getattr(module, "config", None) is shared]

    def give(config: Any) -> None:
        for module in holders:
            module.config = config

    give(own)
    undo.callback(give, shared)


def _register_attention(model: torch.nn.Module, group: Any, calls: Calls, undo: ExitStack) -> None:
    name = next(
        f"alst_sdpa_{n}" for n in itertools.count() if f"alst_sdpa_{n}" not in AttentionInterface._global_mapping
    )
    AttentionInterface.register(name, _sdpa_over(group, calls))
    undo.callback(AttentionInterface._global_mapping.pop, name, None)
    # A name that is missing from the mask interface means "no mask" to transformers, silently.
    AttentionMaskInterface.register(name, _only_plain_causal)
    undo.callback(AttentionMaskInterface._global_mapping.pop, name, None)
    config, before = model.config, model.config._attn_implementation
    config._attn_implementation = name
    undo.callback(setattr, config, "_attn_implementation", before)


def _sdpa_over(group: Any, calls: Calls) -> Callable[..., tuple[torch.Tensor, None]]:
    """Transformers' attention function: q ``[B, H, s, D]``, k and v ``[B, K, s, D]`` to ``[B, s, H, D]``."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        calls.attention += 1
        _check_call(module, query, key, attention_mask, dropout, is_causal, kwargs)

        def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            gqa = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=True, enable_gqa=gqa)

        return ulysses_attention(query, key, value, group, core), None

    return attention


def _check_call(module, query, key, attention_mask, dropout, is_causal, kwargs) -> None:
    """The second net: what the config did not show and the call does."""
    layer = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedModelError(f"{layer} was given a mask of shape {list(attention_mask.shape)}: not verified")
    if query.shape[2] != key.shape[2]:
        raise UnsupportedModelError(
            f"{layer} has {query.shape[2]} queries for {key.shape[2]} keys: generation with a cache, and attention to "
            "other sequences, are not yet available under sequence parallelism"
        )
    if dropout:
        raise UnsupportedModelError(f"{layer}: attention dropout {dropout} is not available; set it to 0")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError(f"{layer}: attention that is not causal is not verified")
    for name in _UNVERIFIED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{layer} was called with {name}: not verified under sequence parallelism")


def _only_plain_causal(*, mask_function: Callable[..., Any], attention_mask: Any = None, **kwargs: Any) -> None:
    """Transformers' mask function: no mask, after making sure that causal is all that is asked for."""
    if mask_function is not causal_mask_function:
        raise UnsupportedModelError(
            f"the model asks for a mask other than plain causal ({mask_function.__qualname__}): windows, chunks and "
            "packed samples are not yet available under sequence parallelism"
        )
    if attention_mask is not None:
        raise UnsupportedModelError(
            "attention_mask reached the model: the sharded loader checks and drops it; remove it from the batch"
        )


def _replace_loss(model: torch.nn.Module, group: Any, calls: Calls, undo: ExitStack) -> None:
    had_own, before = "_loss_function" in vars(model), vars(model).get("_loss_function")

    def restore() -> None:
        if had_own:
            model.loss_function = before
        else:
            del model._loss_function

    def loss_function(
        logits: torch.Tensor,
        labels: torch.Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        ignore_index: int = IGNORED_LABEL,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if shift_labels is None or ignore_index != IGNORED_LABEL:
            raise UnsupportedModelError(
                f"{type(model).__name__} called its loss with shift_labels={shift_labels} and "
                f"ignore_index={ignore_index}: only shifted labels and {IGNORED_LABEL} are verified"
            )
        calls.loss += 1
        return whole_sequence_loss(logits.flatten(0, -2), shift_labels.flatten(), group, num_items_in_batch)

    model.loss_function = loss_function
    undo.callback(restore)
