"""Tiled logits and loss of a transformers model."""

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec, is_causal_lm_loss
from deepspeed_alst.core.patching import PatchSet, add_properties, set_entry
from deepspeed_alst.data.validation import as_int64
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL, shard_divisor
from deepspeed_alst.errors import SetupError, UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import branch
from deepspeed_alst.tiling.lazy_logits import LazyHead, LazyLogits, share_of_loss
from deepspeed_alst.tiling.trl_fused_head import has_fused_head


def tile_loss(
    spec: ModelSpec,
    budget: TiledLossConfig,
    calls: ForwardContext,
    leaf: Callable[[Any], None],
    patches: PatchSet,
) -> str:
    """Make a causal LM compute its logits tile by tile within its loss; return a description.

    ``leaf`` makes the head a ZeRO-3 leaf, whose weights are gathered once per pass (tiling/zero3_leaf.py).

    Raises:
        UnsupportedModelError: the model has no output embeddings.
        SetupError: the chosen kernel cannot run on this machine.
    """
    if budget.backend == "liger":
        from deepspeed_alst.liger.hf_liger import check_liger_runs

        check_liger_runs("alst.tiled_logits_loss", "cuda" if torch.cuda.is_available() else "cpu")
    if budget.backend == "triton":
        from deepspeed_alst.kernels.registry import runs_on

        if not torch.cuda.is_available() and not runs_on(torch.device("cpu")):
            raise SetupError(
                "alst.tiled_logits_loss: 'triton' needs a GPU. Use 'auto' or 'torch', or set TRITON_INTERPRET=1 in the "
                "environment to run the kernel on CPU, a thousand times slower."
            )
    module = spec.head
    if module is None:
        raise UnsupportedModelError(
            f"alst.tiled_logits_loss: {spec.name} has no output embeddings (lm_head). Set the key to false."
        )
    head = LazyHead(module, module.forward, budget, calls)
    leaf(module)
    _patch_head(head, patches)
    _hook_forward(spec, head, calls, patches)
    patches.set(spec.model, "alst_head", head)
    size = f"{budget.tile_tokens} tokens" if budget.tile_tokens else f"{budget.tile_bytes / 2**20:.0f} MiB"
    on_gpu = "Liger's" if budget.backend == "liger" else "Triton's"
    by_kernel = "" if budget.backend == "torch" else f"by {on_gpu} kernel on a GPU, by torch on CPU; "
    return f"{type(module).__name__}, tiles of {size}; {by_kernel}outputs.logits is None in training"


def _hook_forward(spec: ModelSpec, head: LazyHead, calls: ForwardContext, patches: PatchSet) -> None:
    """Make the head's logits lazy in forwards with labels, and raise if their loss is not tiled."""

    def start(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        has_labels = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        head.deferring = (has_labels or calls.loss_follows or calls.gathers_tokens) and not calls.whole
        head.expects_loss = head.deferring and has_labels and not calls.loss_follows
        head.is_tiled = False
        if torch.is_grad_enabled():
            head.weights_copy = None

    def stop(*_: Any) -> None:
        head.deferring = False

    def end(module: torch.nn.Module, args: Any, output: Any) -> None:
        is_tiled = head.is_tiled or has_fused_head(output)
        if head.expects_loss and module.training and torch.is_grad_enabled() and not is_tiled:
            raise UnsupportedModelError(
                f"alst.tiled_logits_loss: {spec.name} computes its loss from full logits, because it does not pass its "
                "head's output to model.loss_function. Set the key to false."
            )
        follows = calls.loss_follows or (calls.gathers_tokens and torch.is_grad_enabled())
        if isinstance(getattr(output, "logits", None), LazyLogits) and not follows:
            if module.training and not (calls.checking or calls.gathers_tokens):
                output.logits = None
                # ZeRO-3's hooks would set the attribute again from a ModelOutput's entry, which stays with a None.
                if isinstance(output, OrderedDict) and "logits" in output:
                    OrderedDict.__delitem__(output, "logits")
                add_properties(output, logits=_LOGITS_OF_TRAINING)
            elif head.logits_wanted:
                output.logits = output.logits.materialize()

    # Every call passes the outermost module.
    patches.hook(spec.outer, "forward_pre", start, with_kwargs=True)
    patches.hook(spec.outer, "forward", stop, always_call=True)
    patches.hook(spec.outer, "forward", end)


def _logits(output: Any) -> Any:
    """Return an output's ``logits``; warn if they are None."""
    logits = vars(output).get("logits")
    if logits is None:
        warnings.warn(
            "outputs.logits is None in training: alst.tiled_logits_loss computes logits in tiles within the loss. Set "
            "the key to false to get them. With sequence_parallel_size above 1 they cover a shard only, and a loss "
            "computed from them is an error: use outputs.loss",
            stacklevel=2,
        )
    return logits


_LOGITS_OF_TRAINING = property(_logits, lambda output, value: set_entry(vars(output), "logits", value))


@contextlib.contextmanager
def logits_wanted(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Set whether evaluations inside return logits as plain tensors; without tiling they always do."""
    head = getattr(ModelSpec(model).model, "alst_head", None)
    with PatchSet() as patches:
        if head is not None:
            patches.set(head, "logits_wanted", wanted)
        yield


def logits_for_loss(output: Any) -> Any:
    """Return a forward's logits to compute a loss from, lazy if the head's are."""
    return output["logits"] if isinstance(output, dict) else output[0]


def patch_unsharded_loss(spec: ModelSpec, patches: PatchSet) -> None:
    """Patch the model's own loss to take lazy logits, without sequence parallelism."""
    original = spec.model.loss_function

    @torch.compiler.disable
    def loss_function(
        logits: torch.Tensor | LazyLogits,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORED_LABEL,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(logits, LazyLogits) or not is_causal_lm_loss(original) or ignore_index != IGNORED_LABEL:
            logits = logits.materialize() if isinstance(logits, LazyLogits) else logits
            return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if shift_labels is not None:
            shift_labels = as_int64("shift_labels", shift_labels)
        else:
            shift_labels = F.pad(as_int64("labels", labels), (0, 1), value=IGNORED_LABEL)[..., 1:]
        return share_of_loss(logits, shift_labels, shard_divisor(shift_labels, num_items_in_batch))

    patches.set(spec.model, "_loss_function", loss_function)


def _patch_head(head: LazyHead, patches: PatchSet) -> None:
    """Patch calls of the head's module to return lazy logits, or to run ``head.override`` with its weights gathered."""
    module, cls = head.module, type(head.module)

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if head.override is not None:
            return cls.__call__(self, *args, **kwargs)
        if head.deferring and len(args) == 1 and not kwargs:
            return LazyLogits(head, args[0])
        with branch()():  # as many draw branches as with lazy logits
            return cls.__call__(self, *args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return head.forward(*args, **kwargs) if head.override is None else head.override(*args, **kwargs)

    # In the class's __call__, before the module's hooks, which would make ZeRO-3 gather the weights too early.
    patches.subclass(module, {"__call__": torch.compiler.disable(call)})
    patches.set(module, "forward", forward)
