"""Count the calls of the patched parts in each forward, and raise if a forward bypasses them."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError

# Names of the cache in transformers: past_key_values before 5.24, cache_params without attention.
CACHES = ("cache", "cache_params", "past_key_values")


@dataclass
class Draws:
    """State that keys a rank's random numbers (random_draws/)."""

    seed: int = 0
    """The same on all ranks."""
    sp_rank: int = 0
    sp_size: int = 1
    """A full sequence on one rank is rank 0 of 1, and draws the numbers that the ranks of a sharded one draw."""
    replica: int = 0
    clock: Callable[[], tuple[int, int]] = lambda: (0, 0)
    """Returns the optimizer step and the micro-step in it."""
    are_counted: bool = False
    """True if a model draws its random numbers by these counters."""
    _now: tuple[int, int] = (-1, -1)
    _forwards: int = 0

    def next_key(self, on_trial: bool) -> tuple[int, ...]:
        """Return the key of the next forward; on trial all forwards have the same."""
        if on_trial:
            return (self.seed,)
        now = self.clock()
        self._forwards = self._forwards + 1 if now == self._now else 0
        self._now = now
        return (self.seed, *now, self._forwards)


@dataclass
class ForwardContext:
    """Call counters and state of the patched parts in one forward."""

    draws: Draws = field(default_factory=Draws)
    """State of this rank's counter-based random numbers."""
    attention: int = 0
    linear: int = 0
    """Calls of sharded layers without attention."""
    with_documents: int = 0
    """Calls of either kind with the bounds of packed documents."""
    loss: int = 0
    router_loss: int = 0
    routes: bool = False
    """True if the model has routers, whose loss may be asked for."""
    loss_follows: bool = False
    """True if the full-sequence loss is computed from the logits after the forward."""
    gradients: int = 0
    """Number of full-sequence losses that have received a gradient."""
    makes_whole_loss: bool = True
    """True if the loss is the full sequence's, False if it is a shard's that user code aggregates."""
    gathers_tokens: bool = False
    """True in a batch that the engine splits: what a program reads of its output is the whole sequence's."""
    mask_of_batch: Callable[..., Any] | None = None
    """Describes a mask of a whole batch, which a multimodal model makes outside of the split part's forward."""
    encodes: bool = False
    """True while a multimodal model's encoder runs on this rank's images."""
    has_masks: bool = False
    """True if the batch's attention_mask is the whole sequence's, as a multimodal model has made it."""
    real_tokens: torch.Tensor | None = None
    """Mask of the non-padding tokens of this rank's shard, ``[B, s]``; None if unknown."""
    expects_attention: bool = True
    inside: bool = False
    """True while a forward of the outermost module runs."""
    whole: bool = False
    """True while forwards bypass the patched parts on purpose: every rank has the full sequence."""
    checking: bool = False
    """True while forwards are the model check's, whose batches are not checked here."""
    saving_frame: Callable[[str, bool], Any] | None = None
    """Returns the frame that saves the next attention call's output (attention/attention_cache.py); None if none is."""
    answer_attention: Callable[..., torch.Tensor] | None = None
    """Takes attention calls in place of a backend while a part of a memory-lean layer runs (memory_lean/parts.py)."""
    chunks_from: int = 0
    """Tokens of a shard from which memory-lean layers run in chunks, below as without the key; 0 if all do."""
    in_chunks: bool = True
    """False if they run as without the key in this forward, on all ranks: ZeRO reduces gradients in their order."""
    node_size: int = 0
    """Ranks of a node; 0 if unknown, or if nodes have different numbers."""
    kv_groups: dict[int, Any] = field(default_factory=dict)
    """Groups of ranks of a node that gather the KV heads that they share from one another, by size."""
    core: str = ""
    """Attention implementation that the model was loaded with."""
    documents: tuple[int, ...] = ()
    """Bounds of the packed documents in this forward's full sequence; empty for a single document."""
    drops_padding: bool = False
    """True if a mask in this forward's batch hides right padding without labels alone (hf_one_rank.py)."""
    highest: int | None = None
    """Highest position id in this forward's full sequence."""
    scale_queries: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] | None = None
    """Scales a layer's queries by the positions of this rank's shard (hf_positions.py)."""

    @contextlib.contextmanager
    def having(self, **values: Any) -> Iterator[None]:
        """Set attributes in the context, and restore all of them at its end."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    @contextlib.contextmanager
    def unsplit(self, config: Any) -> Iterator[None]:
        """Run forwards of the config's model without sequence parallelism in the context."""
        split = config._attn_implementation
        config._attn_implementation = self.core
        try:
            with self.having(whole=True):
                yield
        finally:
            config._attn_implementation = split

    def of_model_check(self) -> contextlib.AbstractContextManager[None]:
        """Mark forwards in the context as the model check's; restore all counters at its end."""
        return self.having(**vars(self) | {"checking": True, "makes_whole_loss": True, "loss_follows": False})

    @torch.compiler.disable
    def leave(self, *_: Any) -> None:
        """Note the end of the outermost module's forward, as its hook."""
        self.inside = False

    def check_inside(self, layer: str) -> None:
        """Raise UnsupportedModelError outside of the outermost module's forward, which checks the batch."""
        # Recomputation in the backward runs layers outside of the model's forward.
        if not self.inside and torch._C._current_graph_task_id() == -1:
            raise UnsupportedModelError(
                f"{layer} was called outside of its causal language model: its input was not checked to be a shard. "
                "Call the engine, with a batch of the sharded loader."
            )

    def note_loss(self, loss: torch.Tensor) -> None:
        """Count a full-sequence loss, and its gradient when it arrives."""
        self.loss += 1

        def count(grad: torch.Tensor) -> None:
            self.gradients += 1

        if loss.requires_grad:
            loss.register_hook(count)


def _why_not_called(model: torch.nn.Module) -> str:
    homes = (each.__module__ for each in type(model).__mro__ if each.__module__.startswith("transformers.models."))
    home = sys.modules.get(next(homes, ""))
    if home is not None and not hasattr(home, "ALL_ATTENTION_FUNCTIONS"):
        return f"{home.__name__} has an attention of its own, which cannot be split: use another model"
    return "Undo whatever replaced its attention (kernels, a subclass)"


def check_calls(spec: ModelSpec, calls: ForwardContext, patches: PatchSet, whole_loss: bool) -> None:
    """Raise if a forward bypasses the patched parts; the loss is checked with ``whole_loss`` alone."""
    name = spec.name

    @torch.compiler.disable
    def reset(module: torch.nn.Module, args: Any) -> None:
        calls.attention = calls.linear = calls.with_documents = calls.loss = calls.router_loss = 0
        calls.inside = True

    @torch.compiler.disable
    def check(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if calls.whole:
            return
        if not calls.attention and calls.expects_attention:
            raise UnsupportedModelError(
                f"{name} did not call transformers' attention interface: its attention sees only a "
                f"shard of the sequence. {_why_not_called(spec.model)}."
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
            if calls.loss_follows or calls.gathers_tokens:
                return
            raise UnsupportedModelError(
                f"{name} ran a training forward without labels: a loss computed from its logits would cover only this "
                "rank's shard. Give the batch labels and use the loss that the model returns, or yield whole batches "
                "with shard_dataloader(loader, engine, whole=True)."
            )
        if getattr(output, "loss", None) is not None and not calls.loss:
            raise UnsupportedModelError(
                f"{name} computed its loss without self.loss_function: it covers only this rank's shard. Undo whatever "
                "replaced its forward (Liger's fused loss, a subclass)."
            )

    # Every call passes the outermost module.
    patches.hook(spec.outer, "forward_pre", reset)
    patches.hook(spec.outer, "forward", calls.leave, always_call=True)  # also where the program catches an error
    patches.hook(spec.outer, "forward", check, with_kwargs=True)
