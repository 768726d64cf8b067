"""Splitting of whole batches at the engine: a Trainer's evaluation by generation, a user's compute_loss, accelerate.

In training the ranks of a sequence have the same batch, and each cuts its shard out of it. In evaluation each may have
its own: they exchange them and run one forward per batch, and every rank gets its own batch's loss and logits.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import PLACE, fingerprint, pad_as_before, pad_on_the_right, shift_labels, tokens_of
from deepspeed_alst.data.validation import LABEL_KEYS
from deepspeed_alst.distributed.collectives import gather_objects, name_missing_ranks
from deepspeed_alst.distributed.gather import gather_predictions, is_too_large
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import AlstError, DataError
from deepspeed_alst.sequence_parallel.batch_check import WAY_OUT, BatchSummary, problem_of
from deepspeed_alst.tiling.lazy_logits import LazyLogits
from deepspeed_alst.tiling.trl_fused_head import PER_TOKEN, has_fused_head

_OF_THE_WHOLE = ("loss", "aux_loss")
_OF_TOKENS = ("logits", "hidden_states", "last_hidden_state")


class NotHere:
    """Placeholder for logits that a rank does not have; any access raises DataError."""

    def __init__(self, why: str) -> None:
        self.__dict__["_why"] = why

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copy and dispatch protocols look these up
            raise AttributeError(name)
        raise DataError(self.__dict__["_why"])

    def __getitem__(self, index: Any) -> NoReturn:
        raise DataError(self.__dict__["_why"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise DataError(next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, cls)).__dict__["_why"])


def is_whole_batch(batch: dict[str, Any]) -> bool:
    """Return True for a whole batch; a shard has shifted labels and positions."""
    if batch.get("shift_labels") is not None and batch.get("logits_to_keep") is None:
        return False
    return PLACE not in batch and (batch.get("labels") is not None or batch.get("position_ids") is None)


def forward_whole_batch(session: Any, forward: Callable[..., Any], batch: dict[str, Any]) -> Any:
    """Split a batch that the ranks of a sequence hold whole, and run the shards."""
    groups, trains, keep = session.groups, torch.is_grad_enabled(), batch.get("logits_to_keep", 0)
    try:
        batch = {key: _for_all_ranks(key, x, batch, groups) for key, x in batch.items()}
        summary = BatchSummary(kind="whole, trained" if trains else "whole, evaluated", digest=_digest(batch))
        batch, first_B = pad_on_the_right(_labels_of_all(batch))
        with_gradient = {key: x for key, x in batch.items() if _has_gradient(x) and _is_by_token(x, batch)}
    except AlstError as error:
        summary = BatchSummary(str(error))
    except Exception as error:
        summary = BatchSummary(f"it cannot be read: {error!r}. {WAY_OUT}")
    with name_missing_ranks(groups.roll_group):
        everyone = [each for each, _ in gather_objects((summary, None), groups.control_group)]
    if (problem := problem_of(everyone, groups.sp_size)) is not None:
        raise DataError(problem)
    same = all(each.digest == everyone[rank - rank % groups.sp_size].digest for rank, each in enumerate(everyone))
    if trains and not same:
        dropout = "Dropout in an encoder that each rank runs makes them differ: set it to 0. "
        raise DataError(
            "batches reached the engine in training that are not split over the ranks of their sequence, and are not "
            f"the same on all of them. {dropout if session.is_multimodal else ''}{WAY_OUT}"
        )
    length = tokens_of(batch).shape[1]
    shards = [session.cut(batch)] if same else _exchanged(session, batch)
    for key, x in with_gradient.items():
        shards[0][key] = _OwnShard.apply(x, shards[0][key].detach(), groups)
    with session.calls.having(makes_whole_loss=True, gathers_tokens=True):
        outputs = [forward(**shard) for shard in shards]
    output = outputs[0 if same else groups.sp_rank]
    if has_fused_head(output):
        return _of_own_places(output, length, first_B)
    if trains:
        # Code that computes the loss after the forward knows that the logits are a shard's.
        return output if session.calls.loss_follows else _whole_sequence(session, output, shards[0], length, first_B)
    kind = "logits" if session.is_causal_lm else "last_hidden_state"
    first = getattr(output, kind, None)
    if same and isinstance(first, torch.Tensor) and is_too_large(first, groups.sp_size) and not _kept(keep):
        return _whole_sequence(session, output, shards[0], length, first_B)  # a teacher's
    found = {key: output[key] for key in _OF_THE_WHOLE if output.get(key) is not None}
    wanted = [[key for key in _OF_TOKENS if each.get(key) is not None] for each in outputs]
    if any(each != wanted[0] for each in wanted):
        raise DataError(f"the ranks of a sequence asked for different outputs: {wanted}. Ask for the same on all")
    for key in dict.fromkeys((kind, *wanted[0])):
        pieces = [getattr(each, key, None) for each in outputs] * (groups.sp_size if same else 1)
        found[key] = _gathered(key, pieces, length, first_B, session)
    if isinstance(logits := found.get("logits"), torch.Tensor):
        found["logits"] = logits[:, _kept_places(keep)]
    return type(output)(**found)


@contextlib.contextmanager
def accept_whole_batches(session: Any) -> Iterator[None]:
    """Accept whole batches too in the context, also by the bare model."""
    if session.splits_decoder:  # which the decoder accepts always
        yield
        return
    outer, before, session.takes_whole = session.outer, session.takes_whole, True
    call = outer._compiled_call_impl or outer._call_impl

    def split(*args: Any, **kwargs: Any) -> Any:
        if args or session.calls.whole or not is_whole_batch(kwargs):
            return call(*args, **kwargs)
        return forward_whole_batch(session, call, kwargs)

    with PatchSet() as patches:
        patches.set(outer, "_compiled_call_impl", split)  # what a module's __call__ runs, hooks included
        try:
            yield
        finally:
            session.takes_whole = before


def _for_all_ranks(key: str, x: Any, batch: dict[str, Any], groups: SequenceGroups) -> Any:
    """Return a value of a batch; in training a tensor's gradient is that of all tokens, the same on all ranks.

    Raises:
        DataError: a tensor with a gradient exceeds 2 GiB.
    """
    if isinstance(x, list | tuple):
        return type(x)(_for_all_ranks(key, each, batch, groups) for each in x)
    if not _has_gradient(x):
        return x.detach() if isinstance(x, torch.Tensor) and x.requires_grad else x
    from deepspeed_alst.whole_sequence.token_rows import replicated

    if is_too_large(x, 1):
        raise DataError(
            f"{key} of shape {list(x.shape)} has a gradient, which each rank would hold whole, {x.nbytes / 2**30:.1f} "
            "GiB, more than 2 GiB. Give the engine shorter sequences, or fewer rows at a time"
        )
    return x if _is_by_token(x, batch) else replicated(x, groups)


def _has_gradient(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled()


def _is_by_token(x: torch.Tensor, batch: dict[str, Any]) -> bool:
    """Return True for a tensor ``[B, S, ...]``, which is cut."""
    return x.shape[:2] == tokens_of(batch).shape[:2]


class _OwnShard(torch.autograd.Function):
    """A shard of a whole tensor, ``[B, s, ...]``, whose gradient is gathered: ``[B, S, ...]``, the same on all ranks.

    A gather is half of the bytes of a sum over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, shard: torch.Tensor, groups: SequenceGroups) -> torch.Tensor:
        ctx.groups, ctx.length = groups, whole.shape[1]
        return shard.view_as(shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Bs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        P = ctx.groups.sp_size
        grads_PBs = grad_Bs.new_empty((P, *grad_Bs.shape))
        with name_missing_ranks(ctx.groups.roll_group):
            dist.all_gather_into_tensor(grads_PBs.flatten(0, 1), grad_Bs.contiguous(), group=ctx.groups.sp_group)
        grad_BS = grads_PBs.transpose(0, 1).flatten(1, 2)[:, : ctx.length]
        return grad_BS.div_(P), None, None  # each is P times that of its own rows (sequence_loss.py)


def _exchanged(session: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Return this rank's shards of its sequence's batches, where its own batch is."""
    device, shards = tokens_of(batch).device, session.exchange(batch)
    return [tree_map_only(torch.Tensor, lambda x: x.to(device), shard) for shard in shards]


def _of_own_places(output: Any, length: int, first_B: torch.Tensor | None) -> Any:
    """Return TRL's fused output with the tokens of the batch as it was given: ``[B, padded S] -> [B, S - 1]``."""
    for key in PER_TOKEN:
        if output.get(key) is not None:
            output[key] = pad_as_before(output[key], first_B)[:, : length - 1]
    return output


def _labels_of_all(batch: dict[str, Any]) -> dict[str, Any]:
    """Expand the labels of a batch with ``logits_to_keep`` to all tokens; raise DataError if they are not as many."""
    keep = batch.get("logits_to_keep")
    batch = {name: x for name, x in batch.items() if name != "logits_to_keep"}
    key = next((key for key in reversed(LABEL_KEYS) if batch.get(key) is not None), None)
    if not _kept(keep) or key is None:
        return batch
    tokens, kept = tokens_of(batch), batch[key]
    places = torch.arange(tokens.shape[1], device=tokens.device)[_kept_places(keep)]
    if kept.shape != (tokens.shape[0], len(places)):
        raise DataError(
            f"{key} has shape {list(kept.shape)}, and logits_to_keep keeps {len(places)} of {tokens.shape[1]} tokens: "
            "give labels to as many, or leave logits_to_keep out"
        )
    shifted = torch.full(tokens.shape[:2], IGNORED_LABEL, dtype=kept.dtype, device=kept.device)
    shifted[:, places.to(kept.device)] = kept if key == "shift_labels" else shift_labels(kept)
    return batch | dict.fromkeys(LABEL_KEYS, shifted)


def _kept(keep: Any) -> bool:
    """Return True if ``logits_to_keep`` selects tokens."""
    return isinstance(keep, torch.Tensor) or bool(keep)


def _kept_places(keep: Any) -> Any:
    """Return the tokens that transformers' ``logits_to_keep`` selects, as an index."""
    return slice(-keep, None) if isinstance(keep, int) else keep


def _whole_sequence(session: Any, output: Any, shard: dict[str, Any], length: int, first_B: torch.Tensor | None) -> Any:
    """Wrap the per-token tensors of a shard's output as tensors of the whole sequence."""
    from deepspeed_alst.whole_sequence.sequence_tensor import SequenceTensor
    from deepspeed_alst.whole_sequence.token_rows import Recorded, Tokens

    B, s = tokens_of(shard).shape[:2]
    tokens, device = Tokens(session.groups, B, s, session.note_own_loss), tokens_of(shard).device
    place_BS = torch.arange(length, device=device).expand(B, length)
    if first_B is not None:
        place_BS = (place_BS - first_B.to(device)[:, None]) % length
    index_BS = torch.arange(B, device=device)[:, None] * s * session.groups.sp_size + place_BS

    def whole(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(map(whole, x))
        if not isinstance(x, torch.Tensor) or x.shape[:2] != (B, s):
            return x
        if isinstance(x, LazyLogits) and not torch.is_grad_enabled():
            x.keep_weights()
        rows = Recorded.of_logits(x) if isinstance(x, LazyLogits) else x.flatten(0, 1)
        return SequenceTensor.of_batch(rows, tokens, index_BS)

    for key in _OF_TOKENS:
        if output.get(key) is not None:
            output[key] = whole(output[key])
    return output


def _gathered(kind: str, pieces: list[Any], length: int, first_B: torch.Tensor | None, session: Any) -> Any:
    if isinstance(pieces[0], tuple | list):
        layers = zip(*pieces, strict=True)
        return type(pieces[0])(_gathered(kind, list(each), length, first_B, session) for each in layers)
    if any(piece is None for piece in pieces) or is_too_large(pieces[0], session.groups.sp_size):
        return NotHere(
            f"outputs.{kind} was read, and that of this batch's whole sequence is not gathered, as it exceeds 2 GiB. "
            "Use outputs.loss, shorter sequences or fewer rows."
        )
    return pad_as_before(gather_predictions(pieces, length, session.groups), first_B)


def _digest(batch: dict[str, Any]) -> str:
    # Features that each rank has of its own images are none (multimodal/deferred.py).
    tensors = [(key, x) for key, value in sorted(batch.items()) for x in tree_leaves(value) if _is_whole(x)]
    options = [f"{key}={x}" for key, x in sorted(batch.items()) if isinstance(x, bool | int | float | str)]
    return " ".join([*options, *(f"{key} {tuple(x.shape)} {x.requires_grad} {_hash(x)}" for key, x in tensors)])


def _is_whole(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not hasattr(x, "shares")


def _hash(x: torch.Tensor) -> int:
    """Hash a tensor on the host, of embeddings ``[B, S, M]`` a sum per token, as they are large and on the device."""
    has_features = x.dim() > 2 and x.is_floating_point()
    return fingerprint((x.detach().sum(-1, dtype=torch.float32) if has_features else x).reshape(-1))
