"""Tiny multimodal models of transformers, and batches of images or audio and text for them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from deepspeed_alst.random_draws.model_draws import is_dropout
from deepspeed_alst.verification.hf_tiny_models import draw_weights, shrink

VOCAB = 160
_TOKENS = 9
"""Text tokens between images."""


def squares(config: Any, count: int, make: torch.Generator) -> dict[str, Any]:
    """Draw square images, ``[count, 3, H, H]``."""
    size = _vision(config).image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(count, 3, height, width, generator=make, dtype=torch.float64)}


def grids(config: Any, count: int, make: torch.Generator) -> dict[str, Any]:
    """Draw the patches of images of different sizes, ``[patches, features]``, and their grids."""
    vision = _vision(config)
    merge = getattr(vision, "spatial_merge_size", 2)
    grid = torch.tensor([[1, merge * (1 + index % 2), merge * 2] for index in range(count)])
    features = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    pixels = torch.randn(int(grid.prod(1).sum()), features, generator=make, dtype=torch.float64)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _vision(config: Any) -> Any:
    return next(getattr(config, name) for name in ("vision_config", "vit_config") if hasattr(config, name))


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Family:
    """One ``model_type``."""

    media: Callable[[Any, int, torch.Generator], dict[str, Any]] = squares
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    types: str = ""
    """Name of the argument that marks image tokens; empty if the model takes none."""


_SMALL = {"image_size": 16, "patch_size": 8}
_QWEN = {"patch_size": 4, "depth": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_heads": 4}
FAMILIES = {
    "llava": Family(vision=_SMALL),
    "vipllava": Family(vision={**_SMALL, "num_hidden_layers": 4}, changed={"vision_feature_layers": [-2, -1]}),
    "qwen2_vl": Family(grids, _QWEN | {"hidden_size": 128}, {"rope_parameters": _MROPE}, types="mm_token_type_ids"),
    "qwen2_5_vl": Family(
        grids,
        _QWEN | {"out_hidden_size": 128, "fullatt_block_indexes": [1], "window_size": 16},
        {"rope_parameters": _MROPE},
        types="mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        grids,
        _QWEN | {"out_hidden_size": 128, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        types="mm_token_type_ids",
    ),
    "qwen3_vl_moe": Family(
        grids,
        _QWEN | {"out_hidden_size": 128, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        types="mm_token_type_ids",
    ),
    "gemma3": Family(vision=_SMALL, changed={"mm_tokens_per_image": 4}, types="token_type_ids"),
    "internvl": Family(vision={"image_size": [16, 16], "patch_size": [4, 4]}),
}


def tiny_model(name: str) -> torch.nn.Module:
    """Build a family's tiny model in fp64, in training mode without dropout, the same on every rank."""
    family = FAMILIES[name]
    config = CONFIG_MAPPING[name]()
    small = shrink(config)
    for part, values in ((small, family.changed), (_vision(small), family.vision), (small.get_text_config(), family.text)):
        for key, value in values.items():
            setattr(part, key, value)
    for place, key in enumerate(sorted(key for key in vars(small) if re.search(r"_token_(id|index)$", key)), 1):
        if isinstance(getattr(small, key), int):
            setattr(small, key, VOCAB - place)
    small = type(small).from_dict(small.to_dict())
    for part in (small, *(getattr(small, each) for each in small.sub_configs if getattr(small, each, None) is not None)):
        for key, rate in list(vars(part).items()):
            if is_dropout(key, rate):
                setattr(part, key, 0.0)
    cls = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = cls._from_config(small, attn_implementation="sdpa", experts_implementation="eager").double()
        draw_weights(model)
    return model.train()


def batch_of(name: str, model: torch.nn.Module, images: tuple[int, ...]) -> dict[str, Any]:
    """Draw a batch of rows with as many images each, padded on the right; tokens of an image stand together."""
    family, config, make = FAMILIES[name], model.config, torch.Generator().manual_seed(len(images) + sum(images))
    media = family.media(config, sum(images), make) if any(images) else {}
    counts = iter(_feature_counts(model, media) if media else [])
    token = next(getattr(config, each) for each in ("image_token_id", "image_token_index") if hasattr(config, each))
    rows, marks = [], []
    for row, number in enumerate(images):
        parts = [_text(_TOKENS + 2 * row, token, make)]
        for _ in range(number):
            parts += [torch.full((next(counts),), token), _text(_TOKENS, token, make)]
        if sum(images) == 1:
            parts += [_text(int(len(torch.cat(parts)) * 1.5), token, make)]
        rows.append(torch.cat(parts))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    mask = torch.stack([torch.arange(longest) < len(row) for row in rows]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((ids == token) | (mask == 0), -100)}
    if family.types:
        batch[family.types] = (ids == token).long()
    return batch | media


def _text(count: int, token: int, make: torch.Generator) -> torch.Tensor:
    ids = torch.randint(10, VOCAB - 20, (count,), generator=make)
    return ids.masked_fill(ids == token, 5)


@torch.no_grad()
def _feature_counts(model: torch.nn.Module, media: dict[str, Any]) -> list[int]:
    """Return the tokens of each image."""
    found = model.get_image_features(**media, return_dict=True).pooler_output
    return [len(each) for each in found]
