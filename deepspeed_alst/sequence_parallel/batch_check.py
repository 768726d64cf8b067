"""Check before each forward that the batch is a shard and matches the other ranks of its sequence.

One small exchange over gloo and a few scalars read from the device per forward, so that all ranks raise together.
"""

import bisect
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deepspeed_alst.core.forward_context import CACHES, ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import PLACE, REAL_TOKENS
from deepspeed_alst.data.validation import Vocabulary, checked, vocabulary_of
from deepspeed_alst.distributed.collectives import gather_objects, raise_on_all_ranks
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import AlstError, DataError

WAY_OUT = (
    "Call engine(**batch) with the whole batch of the sharded loader; for a loader of your own, add: "
    "loader = deepspeed_alst.shard_dataloader(loader, engine)"
)


@dataclass(frozen=True)
class BatchSummary:
    """Summary of one rank's batch, exchanged between ranks."""

    problem: str | None = None
    shape: tuple[int, ...] = ()
    """Batch size and shard length."""
    first: int = 0
    """Position id of the first token."""
    expected: int = 0
    """Offset of the first token in its document, which is its position id, padding aside."""
    highest: int = 0
    """Highest position id of all tokens."""
    documents: int = 0
    """Hash of the packed documents' bounds."""
    kind: Literal["shard", "whole, trained", "whole, evaluated"] = "shard"
    digest: str = ""
    """Fingerprint of a whole batch and its options."""
    batch: int = 0
    """Fingerprint of the full batch, if position ids do not identify the shard's rank."""


def check_batches(
    spec: ModelSpec, groups: SequenceGroups, calls: ForwardContext, patches: PatchSet, planner: Any = None
) -> None:
    """Install the batch check, and the decision of the offload's planner (offload/feature.py), if there is one."""
    vocabulary = vocabulary_of(spec)

    @torch.compiler.disable
    def check(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if calls.whole:
            return None
        if calls.checking:
            calls.real_tokens = kwargs.pop(REAL_TOKENS, None)
            return args, kwargs
        summary, bounds = _read(spec, args, kwargs, vocabulary, groups, calls)
        # Over all ranks, not one sequence's: the other replicas would hang in the gradient reduction.
        planned, refusal = None, None
        if planner is not None and not summary.problem:
            try:
                planned = planner.local_batch(summary.shape)
            except AlstError as error:
                refusal = error
        everyone = gather_objects((summary, planned), groups.control_group)
        problem = problem_of([each for each, _ in everyone], groups.sp_size)
        if problem:
            raise DataError(problem)
        calls.documents = tuple(bounds)
        calls.highest = max(everyone[rank][0].highest for rank in groups.ranks)
        calls.in_chunks = max(each.shape[1] for each, _ in everyone) >= calls.chunks_from
        if planner is not None:
            raise_on_all_ranks(refusal, groups.control_group)
            is_new = True
            try:  # the same decision on all ranks
                is_new = planner.plan([each for _, each in everyone])
            except AlstError as error:
                refusal = error
            if is_new:
                raise_on_all_ranks(refusal, groups.control_group)
        # transformers would cache every layer's keys and values of the shard, which nothing reads.
        kwargs["use_cache"] = False
        if bounds:
            # Built once per forward, so that no layer syncs with the device.
            lengths = kwargs["cu_seq_lens_q"].to(kwargs["position_ids"].device, torch.int32)
            longest = max(end - start for start, end in itertools.pairwise(bounds))
            kwargs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), lengths)
            kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
        return args, kwargs

    patches.hook(spec.outer, "forward_pre", check, prepend=True, with_kwargs=True)


def _read(
    spec: ModelSpec,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    vocabulary: Vocabulary,
    groups: SequenceGroups,
    calls: ForwardContext,
) -> tuple[BatchSummary, list[int]]:
    """Return the summary of a batch and its packed documents' bounds; never raise, as the other ranks wait."""
    bounds: list[int] = []
    try:
        if kwargs.get("cu_seq_lens_q") is not None:
            bounds = kwargs["cu_seq_lens_q"].tolist()
        calls.real_tokens, stamp = kwargs.pop(REAL_TOKENS, None), kwargs.pop(PLACE, None)
        kwargs |= checked(kwargs, vocabulary, takes_gradients=calls.gathers_tokens)
        problem = _problem(spec, args, kwargs, calls)
        if problem is not None:
            return BatchSummary(problem), bounds
        tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        return _place_of(kwargs["position_ids"], stamp, tuple(tokens.shape[:2]), bounds, groups, calls), bounds
    except DataError as error:
        return BatchSummary(str(error)), bounds
    except Exception as error:
        return BatchSummary(f"it cannot be read: {error!r}. {WAY_OUT}"), bounds


def _problem(spec: ModelSpec, args: tuple[Any, ...], kwargs: dict[str, Any], calls: ForwardContext) -> str | None:
    """Return why one rank's arguments are not a shard's that can be trained on; None if they are."""
    tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    labels, shifted, keep = (kwargs.get(key) for key in ("labels", "shift_labels", "logits_to_keep"))
    if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHES):
        return (
            f"a cache is asked for (use_cache, {', '.join(CACHES)}): it would hold only this rank's keys and values; "
            "leave it out. To generate, call model.generate, which runs without sequence parallelism"
        )
    if isinstance(keep, torch.Tensor) or keep:
        return "logits_to_keep is given: each rank has the logits of its shard, and the loss needs all; leave it out"
    if calls.routes:
        from deepspeed_alst.moe.mixtures import router_problem

        if (problem := router_problem(spec, kwargs, calls)) is not None:
            return problem
    if args or tokens is None:
        return f"it is not given by keyword. {WAY_OUT}"
    if kwargs.get("attention_mask") is not None and not calls.has_masks:
        return f"it has an attention_mask, which the sharded loader would have checked and dropped. {WAY_OUT}"
    if kwargs.get("position_ids") is None:
        return f"it has no position_ids, so it is not split over the ranks. {WAY_OUT}"
    if labels is not None and shifted is None:
        return f"it has labels, but no shift_labels, so it is not split over the ranks. {WAY_OUT}"
    if labels is not None:
        # Moved by one, or the same: the HF Trainer needs labels to get a loss.
        labels = labels.to(shifted.device)
        if not torch.equal(labels[:, 1:], shifted[:, :-1]) and not torch.equal(labels, shifted):
            return (
                "its labels and shift_labels disagree (shift_labels are labels moved left by one): the loss uses "
                "shift_labels, so change labels in the dataset or the collate_fn, before the batch is split"
            )
    return None


def _place_of(
    positions: torch.Tensor,
    stamp: torch.Tensor | None,
    shape: tuple[int, ...],
    bounds: list[int],
    groups: SequenceGroups,
    calls: ForwardContext,
) -> BatchSummary:
    """Locate the shard by position ids that count from 0 in each document, else by the loader's stamp."""
    if calls.real_tokens is not None and tuple(calls.real_tokens.shape) != shape:
        return BatchSummary(f"its {REAL_TOKENS} are not those of its {shape[0]} x {shape[1]} tokens. {WAY_OUT}")
    if bounds and (shape[0] != 1 or bounds[-1] != shape[1] * groups.sp_size):
        return BatchSummary(f"its cu_seq_lens_q are not those of the whole sequence, padding included. {WAY_OUT}")
    # Of multi-dimensional position ids the first row is the text's.
    text_s = positions.reshape(-1, positions.shape[-1])[0]
    first, highest, over_all = torch.stack([text_s[0], text_s.max(), positions.max()]).tolist()
    if stamp is not None:
        rank, batch = stamp.tolist()
        if rank != groups.sp_rank:
            return BatchSummary(f"it is the shard of rank {rank} of its sequence, on rank {groups.sp_rank}. {WAY_OUT}")
        return BatchSummary(None, shape, highest=over_all, documents=hash(tuple(bounds)), batch=batch)
    # The loader's right padding repeats the last position id.
    counting_s = torch.arange(first, first + len(text_s)).to(positions).clamp(max=highest)
    if not bounds and not torch.equal(positions, counting_s.expand_as(positions)):
        return BatchSummary(
            f"its position_ids restart, but it has no cu_seq_lens_q of the whole sequence, or do not count on from 0, "
            f"but it has no {PLACE}. {WAY_OUT}"
        )
    place = groups.sp_rank * shape[1]
    place -= bounds[bisect.bisect_right(bounds, place) - 1] if bounds else 0  # the start of its document
    # Python's hash of integers is the same in every process.
    return BatchSummary(None, shape, first, place, over_all, hash(tuple(bounds)))


def problem_of(everyone: list[BatchSummary], sp_size: int) -> str | None:
    """Return why the batches are not shards of sequences, or None; the same on every rank."""
    for rank, summary in enumerate(everyone):
        if summary.problem:
            return f"invalid batch on rank {rank}: {summary.problem}"
    if len({summary.kind for summary in everyone}) > 1:
        return f"whole batches reached the engine on some ranks, shards (or an evaluation's) on others. {WAY_OUT}"
    if everyone[0].kind != "shard":
        return None
    for first in range(0, len(everyone), sp_size):
        ranks = everyone[first : first + sp_size]
        shapes = [summary.shape for summary in ranks]
        starts, highest = [summary.first for summary in ranks], max(summary.highest for summary in ranks)
        # Padding has no position id above the last token's.
        expected = [min(summary.expected, highest) for summary in ranks]
        if any(summary.batch for summary in ranks):
            expected = starts
        if len({(summary.shape, summary.documents, summary.batch) for summary in ranks}) > 1 or starts != expected:
            return (
                f"batches reached the engine that are not split over the ranks of their sequence: ranks {first} to "
                f"{first + sp_size - 1} have shapes {shapes} and position_ids that start at {starts}, or "
                f"packed documents that differ. {WAY_OUT}"
            )
    return None
