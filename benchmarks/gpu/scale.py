"""Sizes of a GPU's run and of its rehearsal on CPU, the systems on one device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu import DEEPSPEED, LEAN, LIGER, TILES
from benchmarks.memory import host_store, put_ours
from benchmarks.tiles.shapes import Shape
from benchmarks.tiles.systems import Step, build, put_tiles
from deepspeed_alst.config.schema import AlstConfig, MemoryLeanConfig, TiledLossConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.liger.hf_liger import apply_liger
from deepspeed_alst.offload.host_buffers import CopyStream

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer and of a loss tile; Llama-3.1-8B's."""

    T: int = 16384
    V: int = 128256
    F: int = 14336
    h: int = 32
    D: int = 128


@dataclass(frozen=True)
class Scale:
    """Sizes of one run."""

    device: str
    shape: Shape
    """A model of few layers."""
    dtypes: tuple[torch.dtype, ...]
    """Those of the comparison with fp64."""
    lean: MemoryLeanConfig
    loss: TiledLossConfig
    parity_tokens: int
    tokens: int
    """Of the peak."""
    peak_lean: MemoryLeanConfig
    """Of the peak; a plan counts 32,768 tokens or more, in few chunks."""
    model: Shape
    """Model of the longest sequences."""
    common_tokens: int
    """Length at which the systems and the offload are timed."""
    limit_bytes: int
    """Device memory within which the longest sequence is looked for."""
    seconds: float
    """Of a search for the longest sequence."""
    kernels: Sizes
    matrix: int
    copy_bytes: int

    @property
    def on_gpu(self) -> bool:
        """True on a GPU."""
        return self.device == "cuda"


def scale_of(device: str, gib: float) -> Scale:
    """Return the sizes of a GPU, with Llama-3.2-1B's, or of a CPU."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    sizes = (2048, 8192, 32, 8, 64, 128256) if device == "cuda" else (128, 448, 4, 2, 32, 512)
    keys = dict(zip(names, sizes, strict=True)) | {"tie_word_embeddings": True}
    if device == "cuda":
        shape, lean = Shape("Llama-3.2-1B", "llama", 4, keys), MemoryLeanConfig()
        return Scale(
            device, shape, (torch.bfloat16,), lean, TiledLossConfig(), parity_tokens=2100, tokens=65536, peak_lean=lean,
            model=replace(shape, num_layers=16), common_tokens=32768, limit_bytes=int(gib * GIB), seconds=15.0,
            kernels=Sizes(), matrix=8192, copy_bytes=GIB,
        )  # fmt: skip
    shape, lean = (
        Shape("small Llama", "llama", 4, keys),
        MemoryLeanConfig(chunk_tokens=256, tile_tokens=256, key_block=512),
    )
    return Scale(
        device, shape, (torch.float32, torch.bfloat16), lean, TiledLossConfig(tile_tokens=256), parity_tokens=1100,
        tokens=8192, peak_lean=MemoryLeanConfig(chunk_tokens=4096, tile_tokens=4096, key_block=4096), model=shape,
        common_tokens=1024, limit_bytes=10 * MIB, seconds=8.0, kernels=Sizes(T=16, V=64, F=32, h=16, D=16),
        matrix=512, copy_bytes=MIB,
    )  # fmt: skip


def seconds_of(scale: Scale, function: Callable[[], Any]) -> float:
    """Return the median seconds of a launch on a GPU, or those of one call on CPU."""
    if scale.on_gpu:
        import triton

        return triton.testing.do_bench(function, return_mode="median") / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def rates(scale: Scale) -> tuple[float, float]:
    """Measure the device: bytes/s of a copy, read and written, and FLOP/s of a bf16 matmul."""
    source, target = (torch.empty(scale.copy_bytes, dtype=torch.uint8, device=scale.device) for _ in range(2))
    copied = 2 * source.nbytes / seconds_of(scale, lambda: target.copy_(source))
    a, b = (torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    return copied, 2 * scale.matrix**3 / seconds_of(scale, lambda: a @ b)


def synchronize(scale: Scale) -> None:
    """Wait for the device."""
    if scale.on_gpu:
        torch.cuda.synchronize()


def step_seconds(scale: Scale, model: Any, step: Step, batch: dict[str, torch.Tensor]) -> float:
    """Return the seconds of a forward and backward."""
    model.zero_grad()
    synchronize(scale)
    begin = time.perf_counter()
    step(batch).backward()
    synchronize(scale)
    return time.perf_counter() - begin


def model_of(scale: Scale, shape: Shape, dtype: torch.dtype) -> Any:
    """Build a model on the device."""
    with torch.device(scale.device):
        return build(shape.config(), shape.num_layers, dtype)


def batch_of(scale: Scale, tokens: int) -> dict[str, torch.Tensor]:
    """Create a batch of one sequence of random tokens."""
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (1, tokens), generator=make).to(scale.device)
    return {"input_ids": ids, "position_ids": torch.arange(tokens, device=scale.device)[None], "labels": ids}


def copy_stream(scale: Scale) -> CopyStream | None:
    """Create a GPU's stream of copies; None on CPU, which copies at once."""
    return CopyStream(torch.cuda, torch.device("cuda")) if scale.on_gpu else None


@contextmanager
def system_on(scale: Scale, system: str, model: Any, **ours: Any) -> Iterator[Step]:
    """Patch a system onto a model on one device; ``ours`` are arguments of ``put_ours``. Liger's patches stay."""
    with PatchSet() as undo:
        if system in (LEAN, TILES):
            lean = scale.lean if system == LEAN else None
            if scale.on_gpu:
                alst = {"tiled_mlp_compute": True, "memory_lean_layer": lean is not None}
                apply_liger(ModelSpec(model), AlstConfig.model_validate({"alst": alst}), scale.device, undo)
            store = host_store(undo, copy_stream(scale))
            yield put_ours(model, 1, undo, **{"lean": lean, "store": store, "loss": scale.loss, **ours})
            return
        model.activation_checkpointing_enable({"use_reentrant": system == DEEPSPEED})
        model.enable_input_require_grads()
        if system == LIGER:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model)
        yield put_tiles(model, "upstream" if system == DEEPSPEED else "untiled", undo, None)
