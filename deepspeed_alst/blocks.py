"""The ``alst`` block of a ds_config, key by key: typed, frozen, unknown keys refused. Pure: no torch, no I/O."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deepspeed_alst.words import shown

# Keys of the alst block whose feature is not in this version, with the values that ask for nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "memory_lean_layer": (False,),
}


def _count(value: Any, of_what: str) -> int:
    """A whole number, which JSON may write as 5e8."""
    if type(value) not in (int, float) or not 1 <= value < 2**63 or value != int(value):
        raise ValueError(f"must be a positive number of {of_what}")
    return int(value)


def _one_size(values: Any) -> Any:
    """A tile has its tokens or its bytes."""
    if isinstance(values, Mapping) and values.get("tile_tokens") is not None and "tile_bytes" in values:
        raise ValueError("use tile_tokens or tile_bytes, not both")
    return values


def _known_backend(value: Any, words: str) -> Any:
    """What makes the loss of a tile."""
    if value not in ("auto", "torch", "triton", "liger"):
        raise ValueError(f"use {words}")
    return value


class TiledMlpBlock(BaseModel):
    """``alst.tiled_mlp_compute`` as an object; ``true`` is an empty one."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tile_tokens: int | None = Field(default=None, ge=1, strict=True)
    """Tokens of a tile. Unset means as many as fit into tile_bytes."""

    tile_bytes: Literal["auto"] | int = "auto"
    """What one module's tiles may need in the backward, the fp32 sums of its weight gradients included. "auto" is 512
    MiB and the sums; of a mixture's experts whose sums pass 1 GiB, one expert's at a time."""

    min_tokens: int = Field(default=2048, ge=0, strict=True)
    """A module that is given fewer tokens than this stays whole, unless tile_tokens is set."""

    fp32_accumulation: bool = Field(default=True, strict=True)
    """Whether half-precision weight gradients are summed in fp32 over the tiles."""

    @field_validator("tile_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return value if value == "auto" else _count(value, 'bytes, or "auto"')

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, values: Any) -> Any:
        return _one_size(values)


class TiledLossBlock(BaseModel):
    """``alst.tiled_logits_loss`` as an object; ``true`` is an empty one, a word such as ``"triton"`` a backend."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tile_tokens: int | None = Field(default=None, ge=1, strict=True)
    """Labelled tokens of a tile. Unset means as many as fit into tile_bytes."""

    tile_bytes: int = 2**30
    """What one tile of logits may need, with what is made of it; a tile has at least 64 tokens. "auto" is 1 GiB."""

    backend: Literal["auto", "torch", "triton", "liger"] = "auto"
    """What makes a tile's loss and gradient; "triton" and "liger" need a GPU. "auto" is "liger" where
    alst.liger_kernel is on, else "triton" on a GPU, and on CPU the compiled op of csrc."""

    @field_validator("backend", mode="before")
    @classmethod
    def _backend(cls, value: Any) -> Any:
        return _known_backend(value, '"auto", "torch", "triton" or "liger"')

    @field_validator("tile_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return 2**30 if value == "auto" else _count(value, 'bytes, or "auto"')

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, values: Any) -> Any:
        return _one_size(values)


class LigerBlock(BaseModel):
    """``alst.liger_kernel`` as an object: parts by Liger's names. One that is not set is used where it can be."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rms_norm: bool | None = Field(default=None, strict=True)
    """RMSNorm."""

    rope: bool | None = Field(default=None, strict=True)
    """Rotary embedding."""

    swiglu: bool | None = Field(default=None, strict=True)
    """The gated activation of MLPs and experts, GeGLU included."""

    geglu: bool | None = Field(default=None, strict=True)
    """GeGLU where a family has it; it goes before swiglu."""

    relu_squared: bool | None = Field(default=None, strict=True)
    """The activation of Nemotron."""

    layer_norm: bool | None = Field(default=None, strict=True)
    """LayerNorm, which vision towers have."""

    fused_linear_cross_entropy: bool | None = Field(default=None, strict=True)
    """The loss, by Liger's kernel in this package's tiles (``tiled_logits_loss``)."""


class ReductionBlock(BaseModel):
    """``alst.reduction``: how gradients are averaged over ranks; it counts where sequence_parallel_size is above 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    slice_bytes: int = Field(default=2**26, ge=4096)
    """Bytes that are reduced at a time, at least 4096. The reduction needs twice that beside the gradients, at most."""

    bucket_size: Literal["auto"] | int | None = None
    """Elements of DeepSpeed's gradient buckets, in place of zero_optimization.reduce_bucket_size; "auto" takes what the
    run has to spare. Unset leaves that key alone."""

    @field_validator("slice_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return _count(value, "bytes")

    @field_validator("bucket_size", mode="before")
    @classmethod
    def _elements(cls, value: Any) -> Any:
        return value if value in ("auto", None) else _count(value, 'elements, or "auto"')


class OffloadBlock(BaseModel):
    """``alst.activation_checkpoint_cpu_offload`` as an object; ``true`` is an empty one."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    nvme_path: str | None = Field(default=None, min_length=1, strict=True)
    """A folder on a fast disk, which must be there, for what the host has no room for."""

    host_budget: Literal["auto"] | int = "auto"
    """Bytes of a host's memory that the activations of all its ranks may take; "auto" is what the host has to spare."""

    keep_last: int = Field(default=1, ge=0, strict=True)
    """Layers at the end of the model whose tensors stay on the device: the backward wants them at once."""

    @field_validator("host_budget", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return value if value == "auto" else _count(value, 'bytes, or "auto"')


class AlstBlock(BaseModel):
    """The ``alst`` block of a ds_config."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    pad_to_multiple_of: Literal["auto"] | int = "auto"
    """Whole sequences are padded on the right to a multiple of this many tokens; "auto" is 256 x SP."""

    expandable_segments: bool | None = Field(default=None, strict=True)
    """The CUDA allocator's expandable segments; unset means on wherever there is CUDA."""

    reduction: ReductionBlock = Field(default_factory=ReductionBlock)
    """Slices and bucket size of the gradient reduction."""

    tiled_mlp_compute: TiledMlpBlock | None = None
    """MLPs and experts tile by tile: true, false or an object."""

    tiled_logits_loss: TiledLossBlock | Literal["auto"] | None = "auto"
    """Logits and loss tile by tile: true, "torch", "triton", "liger", false, an object, or "auto": where sequences
    are split, or where Liger's loss is asked for."""

    liger_kernel: LigerBlock | Literal["auto", True, False] = "auto"
    """Liger's kernels: true, false, an object of parts, or "auto": on a GPU, where Liger knows the model."""

    activation_checkpoint_cpu_offload: OffloadBlock | None = None
    """Checkpointed layer inputs on the host, and on disk: true, false or an object. Turns checkpointing on."""

    check_model: bool = Field(default=True, strict=True)
    """Compare the live model whole against split before the first step: true or false."""

    save_attention_output: bool | Literal["auto"] = "auto"
    """Attention's output and log-sum-exp kept for the backward, where layers are checkpointed: true, false, or "auto":
    with the offload, where the copy hides behind the computation and the host has room."""

    memory_lean_layer: Any = False
    """The memory-lean layer schedule. Not available in this version."""

    @field_validator("pad_to_multiple_of", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError('must be a positive number of tokens, or "auto"')
        return value

    @field_validator("tiled_mlp_compute", mode="before")
    @classmethod
    def _tiled_mlp(cls, value: Any) -> Any:
        if not isinstance(value, bool | Mapping):
            raise ValueError("use true, false, or an object of tile_tokens, tile_bytes, min_tokens, fp32_accumulation")
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("activation_checkpoint_cpu_offload", mode="before")
    @classmethod
    def _offload(cls, value: Any) -> Any:
        if not isinstance(value, bool | Mapping):
            raise ValueError("use true, false, or an object of nvme_path, host_budget, keep_last")
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("save_attention_output", mode="before")
    @classmethod
    def _save_attention(cls, value: Any) -> Any:
        if value != "auto" and not isinstance(value, bool):
            raise ValueError('use true, false or "auto"')
        return value

    @field_validator("tiled_logits_loss", mode="before")
    @classmethod
    def _tiled_loss(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {} if value else None
        if isinstance(value, Mapping):
            return value
        words = 'true, false, "auto", "torch", "triton", "liger", or an object of tile_bytes or tile_tokens, backend'
        return "auto" if _known_backend(value, words) == "auto" else {"backend": value}

    @field_validator("liger_kernel", mode="before")
    @classmethod
    def _liger(cls, value: Any) -> Any:
        if not isinstance(value, bool | Mapping) and value != "auto":
            raise ValueError(f'use true, false, "auto", or an object of {", ".join(LigerBlock.model_fields)}')
        return value

    @field_validator("liger_kernel")
    @classmethod
    def _one_loss(cls, value: Any, info: Any) -> Any:
        """Liger's loss is the tiled loss by another backend."""
        part = value.fused_linear_cross_entropy if isinstance(value, LigerBlock) else None
        loss = info.data.get("tiled_logits_loss", "auto")
        if part and loss is None:
            raise ValueError(
                "fused_linear_cross_entropy is tiled_logits_loss by Liger's kernel, and tiled_logits_loss is false; "
                "leave one of them out"
            )
        backend = getattr(loss, "backend", "auto")
        if part is not None and backend != "auto" and part != (backend == "liger"):
            raise ValueError(
                f"fused_linear_cross_entropy is {shown(part)}, and tiled_logits_loss has the backend "
                f"{shown(backend)}; leave one of them out"
            )
        return value

    @field_validator(*_NOT_YET)
    @classmethod
    def _not_yet(cls, value: Any, info: Any) -> Any:
        idle = _NOT_YET[info.field_name]
        if not any(type(value) is type(ok) and value == ok for ok in idle):
            values = " or ".join(map(shown, idle))
            raise ValueError(
                f"not yet available in this version of deepspeed_alst; remove the key, or set it to {values}"
            )
        return value
