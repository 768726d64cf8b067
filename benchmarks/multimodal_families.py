"""Tiny multimodal models of transformers, and batches of images or audio and text for them."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from deepspeed_alst.multimodal.hf_families import FRAME_BY_FRAME
from deepspeed_alst.random_draws.model_draws import is_dropout
from deepspeed_alst.verification.hf_tiny_models import draw_weights, shrink

VOCAB = 160
_GRAD_NORM_FLOOR = 1e-4
"""Share of all gradients' norm; less is rounding."""
_TOKENS = 9
"""Text tokens between images."""


Media = Callable[[Any, tuple[int, ...], torch.Generator], dict[str, Any]]
"""``(config, images of each row, generator)`` to arguments of the model."""


def squares(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw square images, ``[count, 3, H, H]``."""
    size = _vision(config).image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": _draw(make, sum(images), 3, height, width)}


def sized(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw images and their sizes, ``[count, 3, H, W]``."""
    found = squares(config, images, make)
    return found | {"image_sizes": torch.tensor([found["pixel_values"].shape[2:]] * sum(images))}


def tiled(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw images in tiles of their highest resolution and a thumbnail, ``[count, 3, 3, H, H]``."""
    size = _vision(config).image_size
    pixels = _draw(make, sum(images), 3, 3, size, size)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[size, 2 * size]] * sum(images))}


def of_rows(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw as many images for each row, those that it lacks of zeros, ``[B, most, 3, H, H]``."""
    size = _vision(config).image_size
    pixels = _draw(make, len(images), max(images), 3, size, size)
    for row, count in enumerate(images):
        pixels[row, count:] = 0
    return {"pixel_values": pixels}


def grids(config: Any, images: tuple[int, ...], make: torch.Generator, flat: bool = True) -> dict[str, Any]:
    """Draw the patches of images of different sizes, ``[patches, features]``, and their grids."""
    vision = _vision(config)
    merge = getattr(vision, "spatial_merge_size", 2)
    times = [1 + index % 2 if config.model_type in FRAME_BY_FRAME else 1 for index in range(sum(images))]
    grid = torch.tensor([[time, merge * (1 + index % 2), merge * 2] for index, time in enumerate(times)])
    channels = getattr(vision, "in_channels", getattr(vision, "num_channels", 3))
    shape = channels * getattr(vision, "temporal_patch_size", 1), vision.patch_size, vision.patch_size
    pixels = _draw(make, int(grid.prod(1).sum()), *shape)
    return {"pixel_values": pixels.flatten(1) if flat else pixels, "image_grid_thw": grid}


def patches(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw the patches of images, not flat, ``[patches, 3, P, P]``, and their grids."""
    return grids(config, images, make, flat=False)


def merged_grids(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw grids of patches, of which each 2 x 2 are merged."""
    found = grids(config, images, make)
    return found | {"image_merge_sizes": torch.tensor([2] * sum(images))}


def positioned(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw 4 x 4 patches of each image, ``[count, 16, features]``, and their places."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)
    features = 3 * _vision(config).patch_size ** 2
    pixels = _draw(make, sum(images), 16, features)
    return {"pixel_values": pixels, "image_position_ids": places.expand(sum(images), -1, -1).contiguous()}


def spectra(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw spectra of sounds, ``[count, mels, T]``, and their masks."""
    audio = config.audio_config
    length = 2 * audio.max_source_positions
    frames = _draw(make, sum(images), audio.num_mel_bins, length)
    return {"input_features": frames, "feature_attention_mask": torch.ones(sum(images), length, dtype=torch.long)}


def plain_spectra(config: Any, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw spectra of sounds, ``[count, mels, T]``."""
    return {"input_features": spectra(config, images, make)["input_features"]}


def _draw(make: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=make, dtype=torch.float64)


def _vision(config: Any) -> Any:
    names = ("vision_config", "vit_config", "audio_config", "thinker_config")
    return next(getattr(config, name) for name in names if hasattr(config, name))


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_MROPE_3 = _MROPE | {"mrope_interleaved": True}


@dataclass(frozen=True)
class Family:
    """One ``model_type``."""

    media: Media = squares
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    """Configs that the default config lacks."""
    types: str = ""
    """Name of the argument that marks image tokens; empty if the model takes none."""
    prefix: bool = False
    """True if it marks the tokens behind a prefix with the images instead."""


_SMALL = {"image_size": 16, "patch_size": 8}
_FINE = {"image_size": 16, "patch_size": 4}
_QWEN = {"patch_size": 4, "depth": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_heads": 4}
_QWEN_3 = _QWEN | {"out_hidden_size": 128, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
_GLM = _QWEN | {"out_hidden_size": 128, "image_size": 16}
_LLAMA_4 = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 64)
_PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
_AUDIO = {"max_source_positions": 16, "num_mel_bins": 8, "encoder_layers": 2, "num_hidden_layers": 2}
TYPES = "mm_token_type_ids"
_CODEBOOK = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 16}
"""Of Janus' images to generate, whose default has 2 GiB in fp64."""
FAMILIES = {
    "llava": Family(vision=_SMALL),
    "vipllava": Family(vision={**_SMALL, "num_hidden_layers": 4}, changed={"vision_feature_layers": [-2, -1]}),
    "llava_next": Family(tiled, _SMALL, changed=_PINPOINTS),
    "llava_next_video": Family(tiled, _SMALL, changed=_PINPOINTS),
    "llava_onevision": Family(tiled, _SMALL, changed=_PINPOINTS),
    "video_llava": Family(vision=_SMALL),
    "mistral3": Family(sized, _FINE | {"head_dim": 16}),
    "lighton_ocr": Family(sized, _FINE | {"head_dim": 16}),
    "qwen2_vl": Family(grids, _QWEN | {"hidden_size": 128}, {"rope_parameters": _MROPE}, types=TYPES),
    "qwen2_5_vl": Family(
        grids,
        _QWEN | {"out_hidden_size": 128, "fullatt_block_indexes": [1], "window_size": 16},
        {"rope_parameters": _MROPE},
        types=TYPES,
    ),
    "qwen3_vl": Family(grids, _QWEN_3, {"rope_parameters": _MROPE_3}, types=TYPES),
    "qwen3_vl_moe": Family(grids, _QWEN_3, {"rope_parameters": _MROPE_3}, types=TYPES),
    "qwen3_5": Family(grids, _QWEN_3, {}, types=TYPES),
    "qwen3_5_moe": Family(grids, _QWEN_3, {}, types=TYPES),
    "exaone4_5": Family(
        grids, _QWEN | {"out_hidden_size": 128, "fullatt_block_indexes": [1], "window_size": 16}, types=TYPES
    ),
    "glm4v": Family(grids, _GLM, {"rope_parameters": _MROPE}, types=TYPES),
    "glm46v": Family(grids, _GLM, {"rope_parameters": _MROPE}, types=TYPES),
    "glm4v_moe": Family(grids, _GLM, {"rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]}}, types=TYPES),
    "glm_ocr": Family(grids, _GLM, {"rope_parameters": _MROPE}, types=TYPES),
    "paddleocr_vl": Family(patches, _FINE, {"rope_parameters": _MROPE}, types=TYPES),
    "kimi_k25": Family(patches, _FINE, changed={"projection_hidden_size": 128}, types=TYPES),
    "video_llama_3": Family(merged_grids, _FINE),
    "gemma3": Family(vision=_SMALL, changed={"mm_tokens_per_image": 4}, types="token_type_ids"),
    "paligemma": Family(
        vision=_SMALL | {"projection_dim": 128},
        changed={"projection_dim": 128},
        types="token_type_ids",
        prefix=True,
    ),
    "gemma4": Family(
        positioned,
        {"patch_size": 4, "position_embedding_size": 16, "pooling_kernel_size": 2},
        parts={"vision_config": {}},
        types=TYPES,
    ),
    "internvl": Family(vision={"image_size": [16, 16], "patch_size": [4, 4]}),
    "aya_vision": Family(vision=_FINE, changed={"downsample_factor": 2}),
    "cohere2_vision": Family(vision=_FINE, changed={"downsample_factor": 2}),
    "got_ocr2": Family(vision={"image_size": 64, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1]}),
    "ovis2": Family(vision=_FINE),
    "deepseek_vl": Family(vision=_FINE),
    "janus": Family(vision=_FINE | {"projection_dim": 128}, changed={"vq_config": _CODEBOOK}),
    "aria": Family(vision=_FINE, changed={"projector_patch_to_query_dict": {16: 4}}),
    "idefics2": Family(of_rows, _FINE),
    "idefics3": Family(of_rows, _FINE, changed={"scale_factor": 2}),
    "smolvlm": Family(of_rows, _FINE, changed={"scale_factor": 2}),
    "llama4": Family(vision=_FINE | {"intermediate_size": 512} | _LLAMA_4),
    "qianfan_ocr": Family(vision=_FINE),
    "qwen2_audio": Family(spectra, _AUDIO),
    "voxtral": Family(plain_spectra, _AUDIO | {"intermediate_size": 512}, changed={"audio_token_id": 7}),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Build a family's tiny model, in training mode without dropout, the same on every rank."""
    family = FAMILIES[name]
    config = CONFIG_MAPPING[name](**family.parts)
    small = shrink(config, **family.changed)
    text = small.get_text_config()
    for part, values in ((_vision(small), family.vision), (text, family.text)):
        for key, value in values.items():
            setattr(part, key, value)
    for place, key in enumerate(sorted(key for key in vars(small) if re.search(r"_token_(id|index)$", key)), 1):
        if isinstance(getattr(small, key), int):
            setattr(small, key, VOCAB - place)
    small = type(small).from_dict(small.to_dict())
    for part in (small, *(getattr(small, each, None) for each in small.sub_configs)):
        for key, rate in list(vars(part).items()) if part is not None else ():
            if is_dropout(key, rate):
                setattr(part, key, 0.0)
    cls = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = cls._from_config(small, experts_implementation="eager").to(dtype)
        draw_weights(model)
    return model.train()


def batch_of(name: str, model: torch.nn.Module, images: tuple[int, ...]) -> dict[str, Any]:
    """Draw a batch of rows with as many images each, padded on the right; tokens of an image stand together."""
    family, config, make = FAMILIES[name], model.config, torch.Generator().manual_seed(len(images) + sum(images))
    media = cast(family.media(config, images, make), next(model.parameters()).dtype) if any(images) else {}
    counts = iter(_feature_counts(model, media, sum(images)) if media else [])
    names = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    token = next(getattr(config, each) for each in names if hasattr(config, each))
    rows = []
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
        marked = ids == token
        if family.prefix:
            marked = (marked.flip(1).cumsum(1).flip(1) == 0) & (mask == 1)
        batch[family.types] = marked.long()
    return batch | media


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch, padded on the right, as one row of documents whose positions restart; no first token has a label.

    Without a cache, with which transformers does not keep documents apart.
    """
    mask = batch["attention_mask"].bool()
    found = {key: x[mask][None] if x.shape == mask.shape else x for key, x in batch.items() if key != "attention_mask"}
    positions = (mask.cumsum(1) - 1)[mask][None]
    labels = found["labels"].masked_fill(positions == 0, -100)
    return found | {"labels": labels, "position_ids": positions, "use_cache": False}


@functools.cache
def trained_model(name: str) -> torch.nn.Module:
    """Return a tiny model in fp32 whose parameters without a gradient in a batch of images are frozen; do not train it.

    Those are layers of an encoder that a family leaves out, and biases of keys, which softmax cancels.
    """
    model = tiny_model(name, torch.float32)
    model(**batch_of(name, model, (2, 1))).loss.backward()
    norms = {param: 0.0 if param.grad is None else float(param.grad.norm()) for param in model.parameters()}
    for param, norm in norms.items():
        param.requires_grad_(norm > _GRAD_NORM_FLOOR * math.hypot(*norms.values()))
        param.grad = None
    return model


def draw_batch(name: str, images: tuple[int, ...], make: torch.Generator) -> dict[str, Any]:
    """Draw a batch as ``batch_of`` does, with other text and pixels."""
    batch = batch_of(name, trained_model(name), images)
    text = batch["labels"] >= 0
    token = int(batch["input_ids"][(batch["attention_mask"] == 1) & ~text][0])
    words = _text(int(text.sum()), token, make)
    drawn = {key: batch[key].masked_scatter(text, words) for key in ("input_ids", "labels")}
    drawn |= {key: torch.randn(x.shape, generator=make) for key, x in batch.items() if x.is_floating_point()}
    return batch | drawn


def cast(media: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments with real numbers of a dtype."""
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in media.items()}


def _text(count: int, token: int, make: torch.Generator) -> torch.Tensor:
    ids = torch.randint(10, VOCAB - 20, (count,), generator=make)
    return torch.where(ids == token, 5, ids)


@torch.no_grad()
def _feature_counts(model: torch.nn.Module, media: dict[str, Any], images: int) -> list[int]:
    """Return the tokens of each image."""
    name = "get_audio_features" if "input_features" in media else "get_image_features"
    owner = next((each for each in (model, getattr(model, "model", None)) if hasattr(each, name)), None)
    if owner is None:  # Qwen2-Audio: a convolution and a pooling by 2 each
        return [media["input_features"].shape[2] // 4] * len(media["input_features"])
    output = getattr(owner, name)(**media, return_dict=True)
    found = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    if len(found) == images and not (isinstance(found, torch.Tensor) and found.dim() == 2):
        return [len(each) for each in found]
    return [sum(each.numel() // each.shape[-1] for each in found) // images] * images
