"""Compare the live model unsharded and sharded over the ranks, before its first step.

Legend: n tokens, M hidden size.
"""

import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import SLACK
from deepspeed_alst.data.sharding import REAL_TOKENS
from deepspeed_alst.data.validation import vocabulary_of
from deepspeed_alst.distributed.collectives import agree, gather_objects, is_collective_failure
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import AlstError, UnsupportedModelError
from deepspeed_alst.tiling.lazy_logits import LazyLogits

# A prime, so that no other dim of a tensor is as large as that of the tokens.
TOKENS_PER_RANK = 17
LONGEST = 8192
# Differences inside the model that cancel in its last hidden state may be larger.
_SLACK_INSIDE = 10.0
# Roundings of the result itself, and fp32 roundings of the reductions before it (sums of squares, softmax).
_ROUNDINGS, _FP32_ROUNDINGS = 2, 64
_aten = torch.ops.aten
_PRODUCTS = {
    getattr(_aten, name).default
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product_flash_attention"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_grouped_mm"),
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}
_Outputs = dict[str, torch.Tensor]
"""One run's ``hidden`` states [n, M], ``log_probs`` of labels [n, 1] (0 for ignored ones) and ``loss`` [1, 1]."""
_Seen = dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]
"""Digests of the modules' inputs and outputs in a run."""


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
            product.addcmul_(product, off, value=_rounding(product))
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


def _rounding(product: torch.Tensor) -> float:
    """Return the relative rounding of a matrix product, or of its inputs."""
    has_tf32 = product.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return 2.0**-10 if has_tf32 and product.dtype == torch.float32 else torch.finfo(product.dtype).eps


def check_live_model(spec: ModelSpec, groups: SequenceGroups, calls: ForwardContext, device: torch.device) -> str:
    """Compare the model unsharded against sharded; return a summary. Collective over all ranks.

    Each token's last hidden state and log probability, and the loss, must agree within the model's own rounding error,
    measured by a third run with its matrix products perturbed by a rounding. All runs use the first run's expert
    choices: near a tie, rounding alone reroutes a token. Call it under ``untouched`` and without a graph.

    Raises:
        UnsupportedModelError: the results differ; on all ranks, with the first module that differs.
    """
    short, long, late = lengths(spec, groups.sp_size)
    worst, sizes = 0.0, list[str]()
    for length, at in dict.fromkeys([(short, 0), (long, late)]):
        batches = _batches(spec, groups, length, device, at, with_loss=not sizes and spec.is_causal_lm)
        worst = max(worst, _compare(spec, groups, calls, batches, at + length - 1))
        sizes.append(f"{length} tokens from position {at} on")
    found = f"equal to within {worst:.0e}" if worst else "equal"
    return f"unsharded and sharded are {found} on {' and on '.join(sizes)}"


def lengths(spec: ModelSpec, sp_size: int) -> tuple[int, int, int]:
    """Return the tokens of the first and of the second sequence, and the second's start position."""
    config = spec.text_config
    most = getattr(config, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else LONGEST
    short = min(TOKENS_PER_RANK, max(1, most // sp_size)) * sp_size
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    span = max((each for each in spans if isinstance(each, int)), default=0)
    long = min(max(short, 2 * span), LONGEST, most)
    long -= long % sp_size
    return short, max(short, long), max(0, most - long)


def _compare(
    spec: ModelSpec,
    groups: SequenceGroups,
    calls: ForwardContext,
    batches: tuple[dict[str, Any], dict[str, Any]],
    highest: int,
) -> float:
    """Run a sequence unsharded and sharded; return the largest difference."""
    whole_batch, shard = batches
    recorded: list[torch.Tensor] = []

    def whole(noise: torch.Generator | None = None) -> _Outputs:
        routed = Routed(recorded if noise is not None else None, groups, noise)
        with agree(groups.control_group), calls.unsplit(spec.config), routed:
            outputs = _run(spec, whole_batch, "unsharded")
        recorded[:] = recorded or routed.chosen
        return outputs

    def split() -> _Outputs:
        calls.documents, calls.highest = (), highest
        with Routed(recorded, groups, None):
            return _run(spec, shard, "sharded")

    truth, rounded = whole(), whole(torch.Generator(shard["input_ids"].device).manual_seed(0))
    # Without ``agree``: the other ranks may wait in a collective of their forward, and stop when this one has.
    everyone = gather_objects(_measure(split(), truth, rounded, groups), groups.control_group)
    if problems := [each for each, _, _ in everyone if each]:
        limit = max(each for _, _, each in everyone)
        unsharded, sharded = _watch(spec.outer, whole, whole_batch), _watch(spec.outer, split, shard)
        place = _first_difference(unsharded, sharded, groups, limit)
        place = f"{place} is the first module" if place else "Code around the modules, or the loss, is the first"
        raise UnsupportedModelError(
            f"{spec.name} differs between an unsharded and a sharded forward over {groups.sp_size} ranks: "
            f"{problems[0]}. {place} whose output differs for equal inputs. It, a replaced method or a hook on it "
            "reads other tokens or the sequence length, or draws random numbers. Remove that, or set "
            "sequence_parallel_size to 1; alst.check_model: false trains the model unchecked"
        )
    return max(each for _, each, _ in everyone)


def _batches(
    spec: ModelSpec, groups: SequenceGroups, length: int, device: torch.device, at: int, with_loss: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw random tokens, every seventh unlabelled; return the program's batch and the loader's shard."""
    make = torch.Generator().manual_seed(3)
    known = vocabulary_of(spec)
    vocab = min((each for each in (known.embeddings, known.logits) if each is not None), default=1)
    ids = torch.randint(min(5, vocab - 1), max(vocab - 8, min(6, vocab)), (1, length), generator=make)
    tensors = {"input_ids": ids, "position_ids": torch.arange(at, at + length)[None]}
    if with_loss:
        labels = ids.clone()
        labels[:, ::7] = IGNORED_LABEL
        tensors |= {"labels": labels, "shift_labels": F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)}
    if spec.router_classes:
        tensors[REAL_TOKENS] = torch.ones_like(ids, dtype=torch.bool)
    tensors = {name: each.to(device) for name, each in tensors.items()}
    shard = {name: each.tensor_split(groups.sp_size, 1)[groups.sp_rank] for name, each in tensors.items()}
    given = ("input_ids", "labels", "position_ids") if at else ("input_ids", "labels")
    whole = {name: tensors[name] for name in given if name in tensors}
    if not with_loss and "logits_to_keep" in inspect.signature(spec.model.forward).parameters:
        whole["logits_to_keep"] = shard["logits_to_keep"] = 1  # a long sequence's logits are large
    return whole, shard


def _run(spec: ModelSpec, batch: dict[str, Any], how: str) -> _Outputs:
    """Run one forward, with the same random numbers in each run; an error of the model is an AlstError."""
    try:
        return _outputs(spec, batch)
    except Exception as error:
        if isinstance(error, AlstError) or is_collective_failure(error):
            raise
        words = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UnsupportedModelError(
            f"the model check failed: the {how} forward on input_ids and labels raised {words}. Set "
            "alst.check_model to false to train the model unchecked"
        ) from error


def _outputs(spec: ModelSpec, batch: dict[str, Any]) -> _Outputs:
    states: list[Any] = []
    is_whole = spec.decoder is spec.model

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    torch.manual_seed(0)
    random.seed(0)
    with PatchSet() as patches:
        if not is_whole:
            patches.hook(spec.decoder, "forward", keep)
        output = spec.outer(**batch, use_cache=False)
    found: dict[str, Any] = {}
    if is_whole and not spec.is_causal_lm:
        states.append(output[0])
    if states and isinstance(states[-1], torch.Tensor):
        found["hidden"] = states[-1].flatten(0, -2)
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    if logits is not None and labels is not None:
        logits = logits.materialize() if isinstance(logits, LazyLogits) else logits
        shifted = batch.get("shift_labels", F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL))
        if logits.shape[:2] == shifted.shape:
            rows = logits.flatten(0, 1).float(), shifted.flatten()
            found["log_probs"] = -F.cross_entropy(*rows, ignore_index=IGNORED_LABEL, reduction="none")[:, None]
    if getattr(output, "loss", None) is not None:
        found["loss"] = output.loss.reshape(1, -1)
    return found


def _measure(found: _Outputs, truth: _Outputs, rounded: _Outputs, groups: SequenceGroups) -> tuple[str, float, float]:
    """Compare this rank's tokens; return the problem (empty if none), the largest difference and its limit."""
    worst = most = 0.0
    for name in [each for each in truth if each in found and each in rounded]:
        mine, whole, first = found[name], truth[name], 0
        if name != "loss":
            n = len(whole) // groups.sp_size
            first = groups.sp_rank * n
            if mine.shape != (n, *whole.shape[1:]):
                return f"{name} is {list(mine.shape)} on a rank, {list(whole.shape)} unsharded", math.inf, math.inf
        least = 1e-30 if name == "hidden" else 1.0
        eps = torch.finfo(truth.get("hidden", whole).dtype).eps
        reductions = _FP32_ROUNDINGS * min(eps, torch.finfo(torch.float32).eps)
        limit = SLACK * float(_errors(rounded[name], whole, least).max()) + _ROUNDINGS * eps + reductions
        errors = _errors(mine, whole[first : first + len(mine)], least)
        worst, most = max(worst, float(errors.max())), max(most, limit)
        if not float(errors.max()) <= limit:
            token = "the loss" if name == "loss" else f"token {int(errors.argmax()) + first}'s {name}"
            return f"{token} is off by {float(errors.max()):.1e}; rounding allows {limit:.0e}", worst, limit
    return "", worst, most


def _errors(found: torch.Tensor, expected: torch.Tensor, least: float) -> torch.Tensor:
    """Return each row's difference, relative above ``least``, ``[n, M] -> [n]``; 0 where ``expected`` is NaN or Inf."""
    off, size = (found.double() - expected.double()).norm(dim=-1), expected.double().norm(dim=-1)
    return torch.where(size.isfinite(), (off / size.clamp(min=least)).nan_to_num(nan=math.inf), 0.0)


def _watch(model: torch.nn.Module, run: Callable[[], Any], batch: dict[str, Any]) -> _Seen:
    """Digest input and output of every module's first call in a run, in the order in which calls end."""
    seen: _Seen = {}
    n = batch["input_ids"].shape[1]
    with PatchSet() as patches:
        for name, module in model.named_modules():

            def keep(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                label = f"{name or 'the model'} ({type(module).__name__})"
                seen.setdefault(label, (_digest((args, kwargs), n), _digest(output, n)))

            patches.hook(module, "forward", keep, with_kwargs=True)
        run()
    return seen


def _first_difference(in_whole: _Seen, in_split: _Seen, groups: SequenceGroups, limit: float) -> str | None:
    """Return the first module with equal inputs but different outputs in both runs, the same on all ranks."""

    def same(expected: torch.Tensor | None, found: torch.Tensor | None) -> bool:
        if expected is None or found is None:
            return expected is found
        mine = expected.tensor_split(groups.sp_size)[groups.sp_rank]
        return bool(((mine - found).abs() <= _SLACK_INSIDE * limit * mine[:, :1].abs().clamp(min=1e-30)).all())

    differ = [
        (place, label)
        for place, (label, (taken, given)) in enumerate(in_whole.items())
        if label in in_split and same(taken, in_split[label][0]) and not same(given, in_split[label][1])
    ]
    everyone = [each[0] for each in gather_objects(differ, groups.control_group) if each]
    return min(everyone)[1] if everyone else None


def _digest(values: Any, n: int) -> torch.Tensor | None:
    """Return two numbers per token of the first tensor with a token dim, its norm and a weighted sum: ``[n, 2]``."""
    for x in tree_leaves(values):
        dims = [d for d in (1, 0, 2, 3) if d < x.dim() and x.shape[d] == n] if type(x) is torch.Tensor else []
        if dims:
            rows = x.detach().movedim(dims[0], 0).reshape(n, -1).double()
            weights = torch.cos(torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device))
            return torch.stack([rows.norm(dim=1), rows @ weights], dim=1)
    return None
