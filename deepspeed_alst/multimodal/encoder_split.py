"""Split of an encoder's images or frames over the ranks of a sequence, balanced by patches.

Each rank encodes its own, and sends their features to the ranks that have their tokens (deferred.py). A rank without
any encodes the first one too, whose features nobody uses: ZeRO gathers weights and reduces gradients on all ranks.

Legend: k images (or frames of videos), P ranks of a sequence, M model dim; n rows of features of an image.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import fingerprint
from deepspeed_alst.distributed.collectives import gather_objects, name_missing_ranks
from deepspeed_alst.errors import DataError, UnsupportedModelError
from deepspeed_alst.multimodal.deferred import ImageFeatures, Shares

_IMAGES, _VIDEOS = "get_image_features", "get_video_features"
_ARGUMENTS = {_IMAGES: ("pixel_values", "image_grid_thw"), _VIDEOS: ("pixel_values_videos", "video_grid_thw")}
"""Names of an encoder's patches and of their grids, ``[k, 3]``."""
_OF_AN_IMAGE = ("image_sizes", "image_merge_sizes", "image_position_ids", "pixel_attention_mask")
"""Arguments with an entry for each image; the last two of encoders without grids, else they have one for each patch."""
_FEATURES = ("pooler_output", "deepstack_features")
_SAMPLED = 2**16


def split_encoder(spec: ModelSpec, session: Any, patches: PatchSet, frames: bool, padded: bool = False) -> bool:
    """Split the calls of a model's image encoder and projector; return False if it has none.

    ``frames`` is True if an encoder treats the frames of a video one by one, which are split too; ``padded`` if it
    takes rows that are padded with images of zeros.
    """
    owner = next((each for each in (getattr(spec.model, "model", None), spec.model) if hasattr(each, _IMAGES)), None)
    if owner is None:
        return False
    calls = session.calls

    def wrap(name: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def split(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            more = bound.arguments.pop("kwargs", {})
            given = _without_padding({**bound.arguments, **more}) if padded else {**bound.arguments, **more}
            # In evaluation each rank may have images of its own; a model may encode videos as images.
            is_whole = not torch.is_grad_enabled() or calls.whole or calls.encodes
            images = None if is_whole else Images.of(given, frames, *_ARGUMENTS[name])
            if images is None:
                return encode(*args, **kwargs)
            with calls.having(encodes=True):
                return _encode(encode, given, images, session.groups)

        return split

    for name in (_IMAGES, _VIDEOS) if frames else (_IMAGES,):
        patches.wrap(owner, name, functools.partial(wrap, name))
    return True


@dataclass(frozen=True)
class Images:
    """Images of a batch; a video's frames count as images of their own if the encoder treats them one by one."""

    patches: tuple[int, ...]
    """Patches of each."""
    counts: tuple[int, ...]
    """Number of these that make up each image or video of the batch."""
    pixels: str = "pixel_values"
    grid: str = ""
    """Name of the grids of patches, of which an image has as many rows of ``pixels``; empty if it has one row."""

    @classmethod
    def of(cls, given: dict[str, Any], frames: bool, name: str, grid_name: str) -> "Images | None":
        """Return the images in the arguments of an encoder; None if their layout is not known."""
        pixels, grid = given.get(name), given.get(grid_name)
        if not isinstance(pixels, torch.Tensor) or not len(pixels):
            return None
        known = (name, grid_name, *_OF_AN_IMAGE[: 2 if grid is not None else 4])
        if any(_has_rows(x) or isinstance(x, list) for key, x in given.items() if key not in known):
            return None  # such as an entry for each row of the batch, or the bounds of all images' patches
        if grid is None:
            if any(len(x) != len(pixels) for x in given.values() if _has_rows(x)):
                return None
            return cls((1,) * len(pixels), (1,) * len(pixels), name)
        found, counts = list[int](), list[int]()
        for time, height, width in grid.tolist():
            counts.append(time if frames else 1)
            found += [height * width] * time if frames else [time * height * width]
        return cls(tuple(found), tuple(counts), name, grid_name) if sum(found) == len(pixels) else None

    def shares(self, ranks: int) -> list[list[int]]:
        """Return each rank's images, in order: the largest first, to the rank with the fewest patches."""
        shares: list[list[int]] = [[] for _ in range(ranks)]
        loads = [0] * ranks
        for image in sorted(range(len(self.patches)), key=lambda image: -self.patches[image]):
            rank = loads.index(min(loads))
            shares[rank].append(image)
            loads[rank] += self.patches[image]
        return [sorted(share) for share in shares]

    def arguments(self, given: dict[str, Any], share: list[int]) -> dict[str, Any]:
        """Return the encoder's arguments for some of the images."""
        number, index, found = len(self.counts), torch.tensor(share), dict(given)
        if not self.grid:
            return {key: x[index.to(x.device)] if _has_rows(x) else x for key, x in found.items()}
        pieces = given[self.pixels].split(self.patches)
        found[self.pixels] = torch.cat([pieces[image] for image in share])
        of_batch = torch.repeat_interleave(torch.arange(number), torch.tensor(self.counts))[share]
        for key, x in given.items():
            if key != self.pixels and _has_rows(x) and len(x) == number:
                found[key] = x[of_batch.to(x.device)]
        if list(self.counts) != [1] * number:
            grid = found[self.grid]
            found[self.grid] = torch.cat([torch.ones_like(grid[:, :1]), grid[:, 1:]], dim=1)
        return found


def _without_padding(given: dict[str, Any]) -> dict[str, Any]:
    """Give each image a row of its own, without those of zeros, which encoders drop: ``[B, n, ...] -> [k, 1, ...]``."""
    real_Bn = (given["pixel_values"] != 0).flatten(2).any(2)
    tensors = {key: x for key, x in given.items() if _has_rows(x) and x.shape[:2] == real_Bn.shape}
    return given | {key: x[real_Bn.to(x.device)][:, None] for key, x in tensors.items()}


def _has_rows(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 0


def _encode(encode: Callable[..., Any], given: dict[str, Any], images: Images, groups: Any) -> Any:
    """Encode this rank's images and return an output with the features of all."""
    _check_same(given[images.pixels], groups)
    shares = images.shares(groups.sp_size)
    own = shares[groups.sp_rank] or [0]
    output = encode(**images.arguments(given, own))
    found = {}
    for key in _FEATURES:
        if (features := getattr(output, key, None)) is None:
            continue
        if key == "pooler_output":
            found[key] = _whole(features, own, shares, images, groups)
        else:  # of several layers
            found[key] = [_whole(each, own, shares, images, groups) for each in features]
    return type(output)(**found)


def _check_same(pixels: torch.Tensor, groups: Any) -> None:
    """Raise DataError if the ranks of a sequence have different images; a sample of their values is compared."""
    flat = pixels.detach().reshape(-1)
    sampled = flat[:: max(1, len(flat) // _SAMPLED)]
    with name_missing_ranks(groups.roll_group):
        everyone = gather_objects((tuple(pixels.shape), fingerprint(sampled)), groups.sp_control_group)
    if len(set(everyone)) > 1:
        raise DataError(
            "the ranks of a sequence have different images (pixel values) in training, where each gets the whole "
            "batch: use the sharded loader, loader = deepspeed_alst.shard_dataloader(loader, engine)"
        )


def _whole(features: Any, own: list[int], shares: list[list[int]], images: Images, groups: Any) -> Any:
    """Return what stands for the features of all images, ``[n, M]`` each, as the encoder returns its own."""
    stacked = isinstance(features, torch.Tensor)
    if len(features) != len(own):
        raise UnsupportedModelError(
            f"an image encoder returned features of {len(features)} images for {len(own)}: set sequence_parallel_size "
            "to 1, or train the language model alone"
        )
    mine = list(features)
    lead, M = mine[0].shape[1:-1], mine[0].shape[-1]
    counts = torch.zeros(len(images.patches), dtype=torch.int64, device=mine[0].device)
    if shares[groups.sp_rank]:
        counts[own] = torch.tensor([each.numel() // M for each in mine], device=counts.device)
    with name_missing_ranks(groups.roll_group):
        dist.all_reduce(counts, group=groups.sp_group)
    rows = counts.tolist()
    longest = max(sum(rows[image] for image in share) for share in shares)
    flat = torch.cat([each.reshape(-1, M) for each in mine])[:longest]
    of_all = Shares(F.pad(flat, (0, 0, 0, longest - len(flat))), groups)
    places = [torch.empty(0)] * len(rows)
    for rank, share in enumerate(shares):
        starts = itertools.accumulate((rows[image] for image in share), initial=rank * longest)
        for image, start in zip(share, starts, strict=False):
            places[image] = torch.arange(start, start + rows[image], device=counts.device).view(-1, *lead)
    found = [torch.cat(each) for each in _grouped(places, images.counts)]
    if stacked:
        return ImageFeatures(of_all, torch.stack(found))
    return type(features)(ImageFeatures(of_all, each) for each in found)


def _grouped(items: list[Any], sizes: tuple[int, ...]) -> Iterator[list[Any]]:
    """Yield the next items, as many as each size says."""
    rest = iter(items)
    return (list(itertools.islice(rest, size)) for size in sizes)
