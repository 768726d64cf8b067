"""A video of 512 frames at Qwen2.5-VL's shape: bytes of a rank, wire bytes and the tower's FLOPs, at SP 1 and 8.

    python -m benchmarks.multimodal frames

Counted, not run: the tower on the frames of one rank, without data, a few blocks of it, checkpointed; the language
model as ``ds_alst plan`` counts it. Weights, their gradients and optimizer states, which ZeRO shards, are not counted.

Legend: S tokens of the sample, N patches of the video, M model dim, P = sp_size.
"""

import copy
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2Config
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from benchmarks.figures import Figure, Part
from deepspeed_alst.cli.measure import measure
from deepspeed_alst.cli.memory import GIB, Machine, plan_of
from deepspeed_alst.config.schema import parse
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.multimodal.encoder_split import Images
from deepspeed_alst.profiler.ledger import Ledger

FRAMES, SIDE, TEXT = 512, 448, 1024
"""Frames of the video, their pixels in height and width, and tokens of text."""
_VIDEO = "pixel_values_videos", "video_grid_thw"
# Of Qwen2.5-VL-7B.
_VISION = Qwen2_5_VLConfig(vision_config={"hidden_size": 1280, "intermediate_size": 3420}).vision_config
_SIZES = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
_TEXT = Qwen2Config(num_attention_heads=28, num_key_value_heads=4, **_SIZES)
_FROM_ZERO = ("layer inputs", "backward of a layer", "logits and loss", "attention kernel's workspace")
_DEGREES = (1, 8)
_CAPTION = (
    f"{FRAMES} frames of {SIDE} x {SIDE}, {TEXT} tokens of text, bf16, checkpointed layers, tiled MLP and loss; GiB of "
    "the rank that has most. Features: those of its frames. Embeddings: two copies of its tokens' in the merge, in the "
    "backward of their gradient. The tower's checkpoints are alive until the language model's backward is over."
)


@dataclass(frozen=True)
class Tower:
    """One rank's work in the vision tower."""

    saved: float
    """Bytes kept from its forward to its backward."""
    backward: float
    """Peak in its backward, ``saved`` included."""
    flops: int


@dataclass(frozen=True)
class Rank:
    """Counts of one rank."""

    sp_size: int

    @cached_property
    def images(self) -> Images:
        """The frames of the video, two of which make one grid."""
        vision, side = _VISION, SIDE // _VISION.patch_size
        grid = torch.tensor([[FRAMES // vision.temporal_patch_size, side, side]])
        pixels = torch.empty(int(grid.prod()), 1, device="meta")
        found = Images.of({"pixel_values_videos": pixels, "video_grid_thw": grid}, True, *_VIDEO)
        assert found is not None
        return found

    @cached_property
    def tokens(self) -> int:
        """Tokens of the sample, S."""
        return sum(self.images.patches) // _VISION.spatial_merge_size**2 + TEXT

    @cached_property
    def embeddings(self) -> float:
        """Bytes of a rank's embeddings, [s, M], twice."""
        return 2 * self.tokens * _TEXT.hidden_size * 2 / self.sp_size

    @cached_property
    def features(self) -> float:
        """Bytes of the features of a rank's frames."""
        return (self.tokens - TEXT) * _TEXT.hidden_size * 2 / self.sp_size

    def tower(self, *windowed: bool) -> Tower:
        """Count a tower of a few blocks on this rank's frames, by whether they attend within windows."""
        frames = max(self.images.shares(self.sp_size), key=len)
        vision = copy.deepcopy(_VISION)
        vision.depth, vision._attn_implementation = len(windowed), "sdpa"
        vision.fullatt_block_indexes = [place for place, each in enumerate(windowed) if not each]
        side = SIDE // vision.patch_size
        grid = torch.tensor([[1, side, side]] * len(frames))
        features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        with torch.device("meta"):
            tower = qwen.Qwen2_5_VisionTransformerPretrainedModel(vision).to(torch.bfloat16).train()
            pixels = torch.empty(int(grid.prod(1).sum()), features, dtype=torch.bfloat16)
        tower.gradient_checkpointing_enable({"use_reentrant": False})
        places = qwen.get_vision_position_ids(grid, vision.spatial_merge_size, kwargs={}).to("meta")
        with PatchSet() as patches, Ledger(tower) as ledger:
            patches.set(F, "scaled_dot_product_attention", _flash)
            found = tower(pixels, grid_thw=grid, position_ids=places).pooler_output
            saved = _beside_weights(ledger.timeline[-1]) - found.nbytes - pixels.nbytes
            found.backward(torch.empty_like(found))
        peak = max(map(_beside_weights, ledger.timeline)) - pixels.nbytes
        return Tower(saved, peak, ledger.flops.total())

    @cached_property
    def whole_tower(self) -> Tower:
        """The tower's counts, from those of towers that have a block more."""
        one, full, windowed = self.tower(False), self.tower(False, False), self.tower(False, True)
        wholes = len(_VISION.fullatt_block_indexes)
        flops = one.flops + (wholes - 1) * (full.flops - one.flops)
        flops += (_VISION.depth - wholes) * (windowed.flops - one.flops)
        saved = one.saved + (_VISION.depth - 1) * (windowed.saved - one.saved)
        return Tower(saved, saved + windowed.backward - windowed.saved, flops)

    @cached_property
    def language_model(self) -> float:
        """Peak bytes of the language model's layers, head and loss."""
        alst = {"tiled_mlp_compute": True, "activation_checkpoint_cpu_offload": False, "tiled_logits_loss": True}
        ds_config = {"sequence_parallel_size": self.sp_size, "bf16": {"enabled": True}, "alst": alst}
        ds_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": self.sp_size}
        machine = Machine(self.sp_size, 80 * GIB, 2000 * GIB, 8)
        with tempfile.TemporaryDirectory() as folder:
            _TEXT.save_pretrained(folder)
            model, layers = measure(folder, parse(ds_config))
        plan = plan_of(model, layers, ds_config, machine, math.ceil(self.tokens / self.sp_size))
        return sum(size for name, size in plan.device.items() if name in _FROM_ZERO)

    @property
    def peak(self) -> float:
        """Largest number of bytes at once: in the language model's backward, or in the tower's after it."""
        tower, own = self.whole_tower, self.features + self.embeddings
        return max(tower.saved + own + self.language_model, tower.backward + own)

    @property
    def wire(self) -> float:
        """Bytes that a rank sends: the features of its frames, and the gradient of those of its tokens."""
        return 2 * self.features * (self.sp_size - 1) / self.sp_size


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attend without scores in memory, as kernels do."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def _beside_weights(sample: Any) -> int:
    return sample.total - sample.bytes["weights"] - sample.bytes["gradients"]


def _figures() -> Iterator[Figure]:
    ranks = [Rank(degree) for degree in _DEGREES]

    def row(name: str, values: list[float], unit: float = GIB) -> Figure:
        return Figure(name, tuple(f"{value / unit:.2f}" for value in values))

    yield Figure("tokens of the sample", tuple(f"{each.tokens:,}" for each in ranks))
    yield row("tower: kept until its backward, GiB", [each.whole_tower.saved for each in ranks])
    yield row("tower: peak in its backward, GiB", [each.whole_tower.backward for each in ranks])
    yield row("features and embeddings, GiB", [each.features + each.embeddings for each in ranks])
    yield row("language model, GiB", [each.language_model for each in ranks])
    yield row("peak, GiB", [each.peak for each in ranks])
    yield Figure("tower's share of the peak", tuple(f"{each.whole_tower.saved / each.peak:.0%}" for each in ranks))
    yield row("sent by a rank: features and their gradient, GiB", [each.wire for each in ranks])
    flops = [each.whole_tower.flops for each in ranks]
    share = flops[1] * _DEGREES[1] / flops[0]
    met = abs(share - 1) <= 0.05
    yield Figure("tower's PFLOPs", tuple(f"{each / 1e15:.2f}" for each in flops), "1/P within 5 %", met)


PART = Part(_figures, tuple(f"SP {degree}" for degree in _DEGREES), _CAPTION)
