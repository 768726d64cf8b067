"""Counts how often a forward reached the patched parts, and refuses one that went round them."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.models.dropout import Draws
from deepspeed_alst.models.wrapped import base_model


@dataclass
class Calls:
    """How often the patched parts were reached in one forward."""

    draws: Draws = field(default_factory=Draws)
    """This rank's random numbers."""
    attention: int = 0
    linear: int = 0
    """Calls of layers without attention that are split."""
    with_documents: int = 0
    """Calls of either kind that were told where packed documents end."""
    loss: int = 0
    router_loss: int = 0
    loss_follows: bool = False
    """Whether the loss of the whole sequence is made of the logits after the forward."""
    gradients: int = 0
    """Losses of the whole sequence that a gradient has reached."""
    makes_whole_loss: bool = True
    """Whether the loss is the whole sequence's, and not a shard's that the program aggregates."""
    real_tokens: torch.Tensor | None = None
    """Which tokens of this rank's shard are the sample's own and not padding, ``[B, s]``; None if nobody said."""
    expects_attention: bool = True
    """Whether the model has any."""
    inside: bool = False
    """Whether a forward of the outermost module is under way."""
    whole: bool = False
    """Whether forwards bypass the patched parts on purpose: every rank has the whole sequence."""
    checking: bool = False
    """Whether forwards are the model check's: nobody else looks at their batch."""
    core: str = ""
    """The attention that the model was loaded with."""
    documents: tuple[int, ...] = ()
    """Bounds of the packed documents of this forward's whole sequence; empty where it is one document."""
    highest: int | None = None
    """The highest position in this forward's whole sequence."""

    @contextlib.contextmanager
    def of_whole_sequence(self) -> Iterator[None]:
        """Inside, the loss is the whole sequence's also where a program aggregates shards' in training."""
        before, self.makes_whole_loss = self.makes_whole_loss, True
        try:
            yield
        finally:
            self.makes_whole_loss = before

    @contextlib.contextmanager
    def unsplit(self, config: Any) -> Iterator[None]:
        """Inside, forwards of the model of this config are those without sequence parallelism."""
        split, before = config._attn_implementation, self.whole
        config._attn_implementation, self.whole = self.core, True
        try:
            yield
        finally:
            config._attn_implementation, self.whole = split, before

    @contextlib.contextmanager
    def of_model_check(self) -> Iterator[None]:
        """Inside, forwards are the model check's; all counts are as before at the end."""
        before = dict(vars(self))
        self.checking, self.makes_whole_loss, self.loss_follows = True, True, False
        try:
            yield
        finally:
            vars(self).update(before)

    def enter(self, layer: str, has_documents: bool) -> None:
        """A layer without attention was called.

        Raises:
            UnsupportedModelError: outside of a forward of the outermost module, so nobody has checked its batch.
        """
        # A recomputation in the backward runs layers by themselves.
        if not self.inside and torch._C._current_graph_task_id() == -1:
            raise UnsupportedModelError(
                f"{layer} was called outside of its causal language model: what reached it was not checked to be a "
                "shard. Call the engine, with a batch of the sharded loader."
            )
        self.linear += 1
        self.with_documents += has_documents

    def note_loss(self, loss: torch.Tensor) -> None:
        """A loss of the whole sequence was made; its gradient is to be waited for."""
        self.loss += 1
        if loss.requires_grad:
            loss.register_hook(self._note_gradient)

    def _note_gradient(self, grad: torch.Tensor) -> None:
        self.gradients += 1


def _why_not_called(model: torch.nn.Module) -> str:
    """Why a model goes round transformers' attention interface, and the way out."""
    homes = (each.__module__ for each in type(model).__mro__ if each.__module__.startswith("transformers.models."))
    home = sys.modules.get(next(homes, ""))
    if home is not None and not hasattr(home, "ALL_ATTENTION_FUNCTIONS"):
        return f"{home.__name__} has an attention of its own, which cannot be split: use another model"
    return "Undo whatever replaced its attention (kernels, a subclass)"


def check_calls(model: torch.nn.Module, calls: Calls, patches: PatchSet, whole_loss: bool) -> None:
    """Make sure that a forward went through the patched parts: a subclass, or a library, may have replaced them.

    Where the loss is not to be the whole sequence's (``whole_loss``), a program may make a shard's as it likes.

    ``model`` is the outermost module, which every call passes.
    """
    name = type(base_model(model)).__name__

    @torch.compiler.disable
    def reset(module: torch.nn.Module, args: Any) -> None:
        calls.attention = calls.linear = calls.with_documents = calls.loss = calls.router_loss = 0
        calls.inside = True

    @torch.compiler.disable
    def check(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.inside = False
        if calls.whole:
            return
        if not calls.attention and calls.expects_attention:
            raise UnsupportedModelError(
                f"{name} did not call transformers' attention interface: its attention sees only a "
                f"shard of the sequence. {_why_not_called(base_model(module))}."
            )
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is not None and len(bounds) > 2 and calls.with_documents < calls.attention + calls.linear:
            raise UnsupportedModelError(
                f"{name} does not tell all of its layers where packed documents end (by cu_seq_lens_q, or by a mask): "
                "they would see one another. Give it one document per row."
            )
        if not whole_loss:
            return
        if module.training and torch.is_grad_enabled() and getattr(output, "loss", None) is None and not calls.loss:
            if calls.loss_follows:
                return
            raise UnsupportedModelError(
                f"{name} was trained on without labels: a loss made of its logits is the loss of a "
                "shard. Give the batch labels and use the loss that the model returns."
            )
        if getattr(output, "loss", None) is not None and not calls.loss:
            raise UnsupportedModelError(
                f"{name} made a loss without self.loss_function: it is the loss of a shard. Undo "
                "whatever replaced its forward (Liger's fused loss, a subclass)."
            )

    patches.hook(model, "forward_pre", reset)
    patches.hook(model, "forward", check, with_kwargs=True)
