"""Find the first module whose output differs between the unsharded and the sharded run.

Legend: n tokens of a run: S of the full sequence, s = S/P of a shard.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import gather_objects
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.verification.program_code import module_label

# Multiple of a last hidden state's limit: differences inside the model that cancel there may be larger.
_SLACK = 10.0

_Digest = tuple[int, torch.Tensor]
_Seen = dict[tuple[str, int], tuple[list[_Digest], list[_Digest]]]


def first_difference(
    model: torch.nn.Module,
    whole: Callable[[], Any],
    split: Callable[[], Any],
    length: int,
    groups: SequenceGroups,
    limit: float,
) -> str | None:
    """Return the first module with equal inputs but different outputs in both runs, the same on all ranks.

    Args:
        model: the live model.
        whole: runs the full sequence.
        split: runs this rank's shard.
        length: number of tokens in the full sequence.
        groups: process groups of the engine.
        limit: relative difference due to rounding.
    """
    in_whole = _watch(model, whole, length)
    in_split = _watch(model, split, length // groups.sp_size)
    found = None
    for order, (key, (taken, given)) in enumerate(in_whole.items()):
        other = in_split.get(key)
        if other is None:
            continue
        if _same(taken, other[0], groups, limit) and not _same(given, other[1], groups, limit):
            found = (order, module_label(model, key[0]))
            break
    everyone = [each for each in gather_objects(found, groups.control_group) if each is not None]
    return min(everyone)[1] if everyone else None


def _watch(model: torch.nn.Module, run: Callable[[], Any], n: int) -> _Seen:
    """Record input and output digests of every module call in a run, in the order in which calls end."""
    seen: _Seen = {}
    open_calls: dict[str, list[list[_Digest]]] = {}
    ended: dict[str, int] = {}
    patches = PatchSet()
    for name, module in model.named_modules():

        def before(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            open_calls.setdefault(name, []).append(list(_digests((args, kwargs), n)))

        def after(_: Any, args: Any, output: Any, name: str = name) -> None:
            taken = open_calls[name].pop()
            seen[name, ended.get(name, 0)] = (taken, list(_digests(output, n)))
            ended[name] = ended.get(name, 0) + 1

        # Before user hooks change the arguments, and after they change the output.
        patches.hook(module, "forward_pre", before, prepend=True, with_kwargs=True)
        patches.hook(module, "forward", after)
    with patches:
        run()
    return seen


def _digests(values: Any, n: int) -> Iterator[_Digest]:
    """Yield two numbers per token of each tensor with a token dim: its norm and a weighted sum."""
    for x in tree_leaves(values):
        if type(x) is not torch.Tensor or x.dim() == 0:
            continue
        dim = next((d for d in (1, 0, 2, 3) if d < x.dim() and x.shape[d] == n), None)
        if dim is not None:
            rows = x.detach().movedim(dim, 0).reshape(n, -1).double()
            weights = torch.cos(torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device))
            yield dim, torch.stack([rows.norm(dim=1), rows @ weights], dim=1)


def _same(whole: list[_Digest], split: list[_Digest], groups: SequenceGroups, limit: float) -> bool:
    if [dim for dim, _ in whole] != [dim for dim, _ in split]:
        return False
    for (_, expected), (_, found) in zip(whole, split, strict=True):
        mine = expected.tensor_split(groups.sp_size)[groups.sp_rank]
        off = (mine - found).abs() / mine[:, :1].abs().clamp(min=1e-30)
        if not bool((off <= _SLACK * limit).all()):
            return False
    return True
