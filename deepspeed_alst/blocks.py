"""The ``alst`` block of a ds_config: typed, frozen, unknown keys rejected. Pure: no torch, no I/O."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deepspeed_alst.words import shown

# Keys whose feature is not in this version, with the values that disable it.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "memory_lean_layer": (False,),
}


def _count(value: Any, of_what: str) -> int:
    """Return a positive integer, which JSON may write as 5e8."""
    if type(value) not in (int, float) or not 1 <= value < 2**63 or value != int(value):
        raise ValueError(f"must be a positive number of {of_what}")
    return int(value)


def _one_size(values: Any) -> Any:
    """Raise ValueError if a tile has both tile_tokens and tile_bytes."""
    if isinstance(values, Mapping) and values.get("tile_tokens") is not None and "tile_bytes" in values:
        raise ValueError("use tile_tokens or tile_bytes, not both")
    return values


def _known_backend(value: Any, words: str) -> Any:
    """Return the backend of the tiled loss; raise ValueError if it is unknown."""
    if value not in ("auto", "torch", "triton", "liger"):
        raise ValueError(f"use {words}")
    return value


class TiledMlpBlock(BaseModel):
    """``alst.tiled_mlp_compute`` as an object; ``true`` is an empty object."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tile_tokens: int | None = Field(default=None, ge=1, strict=True)
    """Tokens per tile. Unset means as many as fit into tile_bytes."""

    tile_bytes: Literal["auto"] | int = "auto"
    """Memory for one module's tiles in the backward, including the fp32 sums of its weight gradients. "auto" is 512 MiB
    plus the sums; for a mixture of experts whose sums exceed 1 GiB, plus those of one expert at a time."""

    min_tokens: int = Field(default=2048, ge=0, strict=True)
    """A module with fewer input tokens than this is not tiled, unless tile_tokens is set."""

    fp32_accumulation: bool = Field(default=True, strict=True)
    """True if half-precision weight gradients are summed in fp32 over the tiles."""

    @field_validator("tile_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return value if value == "auto" else _count(value, 'bytes, or "auto"')

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, values: Any) -> Any:
        return _one_size(values)


class TiledLossBlock(BaseModel):
    """``alst.tiled_logits_loss`` as an object; ``true`` is an empty object, a string such as ``"triton"`` a backend."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tile_tokens: int | None = Field(default=None, ge=1, strict=True)
    """Labelled tokens per tile. Unset means as many as fit into tile_bytes."""

    tile_bytes: int = 2**30
    """Memory for one tile of logits and its temporaries; a tile has at least 64 tokens. "auto" is 1 GiB."""

    backend: Literal["auto", "torch", "triton", "liger"] = "auto"
    """Implementation of a tile's loss and gradient; "triton" and "liger" need a GPU. "auto" is "liger" if
    alst.liger_kernel is on, else "triton" on a GPU, and the compiled op of csrc on CPU."""

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
    """``alst.liger_kernel`` as an object of parts with Liger's names; unset parts are used where possible."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rms_norm: bool | None = Field(default=None, strict=True)
    """RMSNorm."""

    rope: bool | None = Field(default=None, strict=True)
    """Rotary embedding."""

    swiglu: bool | None = Field(default=None, strict=True)
    """Gated activation of MLPs and experts, including GeGLU."""

    geglu: bool | None = Field(default=None, strict=True)
    """GeGLU where a family has it; takes precedence over swiglu."""

    relu_squared: bool | None = Field(default=None, strict=True)
    """Activation of Nemotron."""

    layer_norm: bool | None = Field(default=None, strict=True)
    """LayerNorm, as in vision towers."""

    fused_linear_cross_entropy: bool | None = Field(default=None, strict=True)
    """Loss by Liger's kernel in this package's tiles (``tiled_logits_loss``)."""


class ReductionBlock(BaseModel):
    """``alst.reduction``: gradient averaging over ranks, used if sequence_parallel_size is above 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    slice_bytes: int = Field(default=2**26, ge=4096)
    """Bytes reduced at a time, at least 4096. The reduction needs at most twice that in addition to the gradients."""

    bucket_size: Literal["auto"] | int | None = None
    """Elements of DeepSpeed's gradient buckets, instead of zero_optimization.reduce_bucket_size; "auto" derives it from
    the spare memory. Unset leaves that key unchanged."""

    @field_validator("slice_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return _count(value, "bytes")

    @field_validator("bucket_size", mode="before")
    @classmethod
    def _elements(cls, value: Any) -> Any:
        return value if value in ("auto", None) else _count(value, 'elements, or "auto"')


class OffloadBlock(BaseModel):
    """``alst.activation_checkpoint_cpu_offload`` as an object; ``true`` is an empty object."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    nvme_path: str | None = Field(default=None, min_length=1, strict=True)
    """Existing folder on a fast disk, for activations that exceed the host memory."""

    host_budget: Literal["auto"] | int = "auto"
    """Bytes of a host's memory for the activations of all its ranks; "auto" is the spare memory of the host."""

    keep_last: int = Field(default=1, ge=0, strict=True)
    """Number of last layers whose tensors stay on the device: the backward needs them at once."""

    @field_validator("host_budget", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return value if value == "auto" else _count(value, 'bytes, or "auto"')


class AlstBlock(BaseModel):
    """The ``alst`` block of a ds_config."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    pad_to_multiple_of: Literal["auto"] | int = "auto"
    """Multiple of tokens to which whole sequences are padded on the right; "auto" is 256 x SP."""

    expandable_segments: bool | None = Field(default=None, strict=True)
    """Expandable segments of the CUDA allocator; unset means on if there is CUDA."""

    reduction: ReductionBlock = Field(default_factory=ReductionBlock)
    """Slice size and bucket size of the gradient reduction."""

    tiled_mlp_compute: TiledMlpBlock | None = None
    """Tiling of MLPs and experts: true, false or an object."""

    tiled_logits_loss: TiledLossBlock | Literal["auto"] | None = "auto"
    """Tiling of logits and loss: true, "torch", "triton", "liger", false, an object, or "auto": on if sequences are
    sharded or Liger's loss is requested."""

    liger_kernel: LigerBlock | Literal["auto", True, False] = "auto"
    """Liger kernels: true, false, an object of parts, or "auto": on a GPU, if Liger supports the model."""

    activation_checkpoint_cpu_offload: OffloadBlock | None = None
    """Offload of checkpointed layer inputs to host and disk: true, false or an object. Enables checkpointing."""

    check_model: bool = Field(default=True, strict=True)
    """Comparison of the live model, unsharded against sharded, before the first step: true or false."""

    save_attention_output: bool | Literal["auto"] = "auto"
    """Attention output and log-sum-exp kept for the backward of checkpointed layers: true, false, or "auto": with the
    offload, if the copy overlaps with computation and the host has memory."""

    memory_lean_layer: Any = False
    """Memory-lean layer schedule. Not available in this version."""

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
        """Raise ValueError if Liger's loss contradicts tiled_logits_loss, of which it is a backend."""
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
