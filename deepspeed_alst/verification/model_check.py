"""Compare the live model unsharded and sharded over the ranks, before its first step.

Every rank runs one short sequence through the model to be trained, with its weights, methods, hooks and training mode,
unsharded and sharded. Each token's last hidden state and log probability, and the loss, must agree within the model's
own rounding error, measured by a third run with its matrix products perturbed by a rounding. All runs use the first
run's expert choices: near a tie, rounding alone reroutes a token.

Legend: S whole sequence, s = S/P of one rank, V vocabulary, n tokens, M hidden size.
"""

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.data.sharding import REAL_TOKENS
from deepspeed_alst.data.validation import vocabulary_of
from deepspeed_alst.distributed.collectives import agree, gather_objects
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.distributed.roll_call import is_collective_failure
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import AlstError, UnsupportedModelError
from deepspeed_alst.moe.hf_experts import router_classes
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.tiling.lazy_logits import LazyLogits

TOKENS_PER_RANK = 16
LONGEST = 8192
_SLACK = 3.0
# Roundings of the result itself, and fp32 roundings of the reductions before it (sums of squares, softmax).
_ROUNDINGS, _FP32_ROUNDINGS = 2, 64
_aten = torch.ops.aten
_PRODUCTS = {
    getattr(_aten, name).default
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product_flash_attention"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}


@dataclass
class Outputs:
    """Outputs of one run, for this rank's tokens or for all."""

    hidden: torch.Tensor | None
    """Last hidden states, ``[n, M]``."""
    log_probs: torch.Tensor | None
    """Log probabilities of the labels, ``[n]``; 0 for ignored ones."""
    loss: torch.Tensor | None


class Routed(TorchDispatchMode):
    """Dispatch mode that records expert choices or replays recorded ones; ``noise`` perturbs products."""

    def __init__(self, recorded: list[torch.Tensor] | None, groups: SequenceGroups, noise: torch.Generator | None):
        super().__init__()
        self.chosen: list[torch.Tensor] = []
        self._recorded, self._groups, self._noise = recorded, groups, noise

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is _aten.topk.default:
            return self._routed(output, *args, **(kwargs or {}))
        if self._noise is not None and func in _PRODUCTS:
            product = output[0] if isinstance(output, tuple | list) else output
            off = torch.empty_like(product).uniform_(-1.0, 1.0, generator=self._noise)
            product.addcmul_(product, off, value=torch.finfo(product.dtype).eps)
        return output

    def _routed(self, output: Any, x: torch.Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
        place = len(self.chosen)
        self.chosen.append(output[1])
        if self._recorded is None or place >= len(self._recorded):
            return output
        chosen, P, rank = self._recorded[place], self._groups.sp_size, self._groups.sp_rank
        if chosen.shape != output[1].shape:
            cut = [d for d in range(chosen.dim()) if chosen.shape[d] == P * output[1].shape[d]]
            if chosen.dim() != output[1].dim() or len(cut) != 1:
                return output
            chosen = chosen.tensor_split(P, cut[0])[rank]
        return x.gather(dim, chosen), chosen


def check_live_model(
    model: torch.nn.Module,
    groups: SequenceGroups,
    calls: ForwardContext,
    device: torch.device,
    before_run: Callable[[], None] = lambda: None,
) -> str:
    """Compare the model unsharded against sharded; return a summary. Collective over all ranks.

    Call it under ``untouched`` and without a graph; ``before_run`` is called before each forward.

    Raises:
        UnsupportedModelError: the results differ; on all ranks, with the first module that differs.
    """
    short, long, late = lengths(model, groups.sp_size)
    check = _Check(model, groups, calls, device, before_run)
    worst = check.compare(short, at=0, with_loss=True)
    if (long, late) != (short, 0):
        worst = max(worst, check.compare(long, at=late, with_loss=False))
    places = f"{long} tokens" + (f" from position {late} on" if late else "")
    return f"whole and split agree to {worst:.0e} on {max(short, long) if not late else f'{short} and {places}'}"


def lengths(model: torch.nn.Module, sp_size: int) -> tuple[int, int, int]:
    """Return the tokens of the first and of the second sequence, and the second's start position."""
    config = base_model(model).config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else LONGEST
    short = min(TOKENS_PER_RANK, max(1, most // sp_size)) * sp_size
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    span = max((each for each in spans if isinstance(each, int)), default=0)
    long = min(max(short, 2 * span), LONGEST, most)
    long -= long % sp_size
    return short, max(short, long), max(0, most - long)


@dataclass
class _Check:
    """Model, sequence-parallel group and pre-forward callback of one check."""

    model: torch.nn.Module
    groups: SequenceGroups
    calls: ForwardContext
    device: torch.device
    before_run: Callable[[], None]

    def compare(self, length: int, at: int, with_loss: bool) -> float:
        """Run ``length`` tokens from position ``at`` on; return the largest relative difference."""
        model, groups, calls = self.model, self.groups, self.calls
        whole_batch, shard = _batches(model, groups, length, self.device, at, with_loss)
        noise = torch.Generator(self.device).manual_seed(0)
        recorded: list[torch.Tensor] = []

        def whole(rounding: torch.Generator | None = None) -> Outputs:
            routed = Routed(recorded if rounding is not None else None, groups, rounding)
            self.before_run()
            with calls.unsplit(base_model(model).config), routed:
                outputs = _run(model, whole_batch)
            if rounding is None:
                recorded[:] = routed.chosen
            return outputs

        def split() -> Outputs:
            calls.documents, calls.highest = (), at + length - 1
            self.before_run()
            with Routed(recorded, groups, None):
                return _run(model, shard)

        truth, off = _together(whole, groups, "whole"), _together(lambda: whole(noise), groups, "whole")
        # Not exchanged: the other ranks may wait in a collective of their forward, and stop when this one has.
        found = _outputs(split, "split")
        problem, worst, limit = _judge(found, truth, off, groups)
        everyone = gather_objects((problem, worst, limit), groups.control_group)
        problems = [each for each, _, _ in everyone if each]
        if problems:
            limit = max(each for _, _, each in everyone)
            from deepspeed_alst.verification.first_difference import first_difference

            place = first_difference(model, whole, split, length, groups, limit)
            raise UnsupportedModelError(_words(model, problems[0], place, groups.sp_size))
        return max(each for _, each, _ in everyone)


def _words(model: torch.nn.Module, problem: str, place: str | None, sp_size: int) -> str:
    place = place or "what the model's forward does around its modules, or its loss,"
    return (
        f"{type(base_model(model)).__name__} gives another result whole than split over {sp_size} ranks: {problem}. "
        f"{place} is the first module that makes another output of the same input. What it runs, "
        "replaced methods and hooks of the program's included, looks at other tokens, at the "
        "sequence's length, or draws random numbers. Undo that, or set sequence_parallel_size to 1; with "
        "alst.check_model: false it would be trained as it is"
    )


def _batches(
    model: torch.nn.Module, groups: SequenceGroups, length: int, device: torch.device, at: int, with_loss: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw random tokens, every seventh unlabelled; return the program's batch and the loader's shard."""
    make = torch.Generator().manual_seed(3)
    known = vocabulary_of(model)
    vocab = min((each for each in (known.embeddings, known.logits) if each is not None), default=1)
    ids = torch.randint(min(5, vocab - 1), max(vocab - 8, min(6, vocab)), (1, length), generator=make)
    labels = ids.clone()
    labels[:, ::7] = IGNORED_LABEL
    tensors = {"input_ids": ids, "position_ids": torch.arange(at, at + length)[None]}
    if with_loss:
        tensors |= {"labels": labels, "shift_labels": F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)}
    if router_classes(model):
        tensors[REAL_TOKENS] = torch.ones_like(ids, dtype=torch.bool)
    tensors = {name: each.to(device) for name, each in tensors.items()}
    shard = {name: each.tensor_split(groups.sp_size, 1)[groups.sp_rank] for name, each in tensors.items()}
    given = ("input_ids", "labels", *(["position_ids"] if at else []))
    whole = {name: tensors[name] for name in given if name in tensors}
    if not with_loss and "logits_to_keep" in inspect.signature(base_model(model).forward).parameters:
        whole["logits_to_keep"] = shard["logits_to_keep"] = 1  # a long sequence's logits are large
    return whole, shard


def _run(model: torch.nn.Module, batch: dict[str, Any]) -> Outputs:
    """Run one forward, with the same random numbers in each run."""
    states: list[torch.Tensor] = []
    decoder = getattr(base_model(model), "base_model", model)

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    torch.manual_seed(0)
    random.seed(0)
    with PatchSet() as patches:
        if decoder is not base_model(model):
            patches.hook(decoder, "forward", keep)
        output = model(**batch, use_cache=False)
    hidden = states[-1].flatten(0, -2) if states and isinstance(states[-1], torch.Tensor) else None
    return Outputs(hidden, _log_probs(output, batch), getattr(output, "loss", None))


def _log_probs(output: Any, batch: dict[str, Any]) -> torch.Tensor | None:
    """Return the log probability of each token's label; None if the forward has no logits or labels."""
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    if logits is None or labels is None:
        return None
    if isinstance(logits, LazyLogits):
        logits = logits.make()
    shifted = batch.get("shift_labels")
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) if shifted is None else shifted
    if logits.shape[:2] != shifted.shape:
        return None
    return -F.cross_entropy(
        logits.flatten(0, 1).float(), shifted.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )


def _together(run: Callable[[], Outputs], groups: SequenceGroups, how: str) -> Outputs:
    """Run on all ranks; raise an error of any rank on all."""
    with agree(groups.control_group):
        outputs = _outputs(run, how)
    return outputs


def _outputs(run: Callable[[], Outputs], how: str) -> Outputs:
    """Run; raise UnsupportedModelError for whatever the model's code raises, but for a lost rank."""
    try:
        return run()
    except Exception as error:
        if isinstance(error, AlstError) or is_collective_failure(error):
            raise
        words = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UnsupportedModelError(
            f"the model cannot be run {how} on a sequence of input_ids and labels, so nobody knows whether it is right "
            f"under sequence parallelism ({words}). Set alst.check_model to false to train it unchecked"
        ) from error


def _judge(found: Outputs, truth: Outputs, off: Outputs, groups: SequenceGroups) -> tuple[str, float, float]:
    """Compare this rank's tokens; return the problem (empty if none), the largest difference and its limit."""
    worst = most = 0.0
    for name, compare in (("hidden", _of_norms), ("log_probs", _of_values), ("loss", _of_values)):
        mine, whole, rounded = (getattr(each, name) for each in (found, truth, off))
        if mine is None or whole is None or rounded is None:
            continue
        rows = slice(None)
        if name != "loss":
            n = len(whole) // groups.sp_size
            rows = slice(groups.sp_rank * n, (groups.sp_rank + 1) * n)
            if len(mine) != n or mine.shape[1:] != whole.shape[1:]:
                return f"{list(mine.shape)} of {name} on a rank, {list(whole.shape)} of the whole", math.inf, math.inf
        dtype = (truth.hidden if truth.hidden is not None else whole).dtype
        rounding = _FP32_ROUNDINGS * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        limit = _SLACK * float(compare(rounded, whole).max()) + _ROUNDINGS * torch.finfo(dtype).eps + rounding
        errors = compare(mine.reshape(-1, *whole.shape[1:]), whole.reshape(-1, *whole.shape[1:])[rows])
        worst, most = max(worst, float(errors.max())), max(most, limit)
        if not float(errors.max()) <= limit:
            token = "the loss" if name == "loss" else f"token {int(errors.argmax()) + (rows.start or 0)}'s {name}"
            return f"{token} is off by {float(errors.max()):.1e}, where rounding makes {limit:.0e}", worst, limit
    return "", worst, most


def _of_norms(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return each token's relative difference, ``[n, M] -> [n]``; 0 where the unsharded run is NaN or Inf."""
    off, size = (found.double() - expected.double()).norm(dim=-1), expected.double().norm(dim=-1)
    return torch.where(size.isfinite(), (off / size.clamp(min=1e-30)).nan_to_num(nan=math.inf), 0.0)


def _of_values(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return each value's difference, relative above 1; 0 where the unsharded run is NaN or Inf."""
    off = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1.0)
    return torch.where(expected.isfinite(), off.nan_to_num(nan=math.inf), 0.0).reshape(-1)
