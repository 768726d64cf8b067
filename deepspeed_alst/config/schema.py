"""Keys of a ds_config that this package reads, and ``parse``, which checks them. Pure: no torch, no I/O."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from deepspeed_alst.config.config_file import OURS, TOP_KEYS, correction, near_misses, nearest, place_of
from deepspeed_alst.config.validators import number_of, one_of
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import as_word, shown

ReductionDtype = Literal["fp32", "bf16", "fp16"]
Packing = Literal["lossless", "auto", False]
_LOSS_BYTES = 2**30


def _lowercase(value: Any) -> Any:
    # DeepSpeed does so too (deepspeed.runtime.config.get_communication_data_type). An error shows the user's spelling.
    return value.lower() if isinstance(value, str) and value.lower() in get_args(ReductionDtype) else value


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _TilesConfig(_Block):
    tile_tokens: StrictInt | None = Field(default=None, ge=1)
    """Tokens per tile; in the loss, labelled ones. Unset means as many as fit into tile_bytes."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.tile_tokens is not None and "tile_bytes" in self.model_fields_set:
            raise ValueError("use tile_tokens or tile_bytes, not both")
        return self


class TiledMLPConfig(_TilesConfig):
    """``alst.tiled_mlp_compute`` as an object; ``true`` is an empty object."""

    tile_bytes: Annotated[Literal["auto"] | int, number_of("bytes", "auto")] = "auto"
    """Memory for one module's tiles in the backward, including the fp32 sums of its weight gradients; "auto" is 512 MiB
    plus the sums, or plus one expert's if a mixture's exceed 1 GiB."""
    min_tokens: StrictInt = Field(default=2048, ge=0)
    """A module with fewer input tokens than this is not tiled, unless tile_tokens is set."""
    fp32_accumulation: StrictBool = True
    """True if half-precision weight gradients are summed in fp32 over the tiles."""


class TiledLossConfig(_TilesConfig):
    """``alst.tiled_logits_loss`` as an object; ``true`` is an empty object, a string such as ``"triton"`` a backend."""

    tile_bytes: Annotated[
        int, number_of("bytes", "auto"), BeforeValidator(lambda value: _LOSS_BYTES if value == "auto" else value)
    ] = _LOSS_BYTES
    """Memory for one tile of logits and its temporaries; a tile has at least 64 tokens. "auto" is 1 GiB."""
    backend: Literal["auto", "torch", "triton", "liger"] = "auto"
    """Implementation of a tile's loss and gradient; "triton" and "liger" need a GPU. "auto" is "liger" if
    alst.liger_kernel is on, else "triton" on a GPU, and "torch" on CPU."""


class LigerConfig(_Block):
    """``alst.liger_kernel`` as an object of parts with Liger's names; unset parts are used where possible."""

    rms_norm: StrictBool | None = None
    """RMSNorm."""
    rope: StrictBool | None = None
    """Rotary position embedding."""
    swiglu: StrictBool | None = None
    """Gated activation of MLPs and experts, including GeGLU."""
    geglu: StrictBool | None = None
    """GeGLU where a family has it; takes precedence over swiglu."""
    relu_squared: StrictBool | None = None
    """Squared ReLU of MLPs."""
    layer_norm: StrictBool | None = None
    """LayerNorm."""
    fused_linear_cross_entropy: StrictBool | None = None
    """Loss by Liger's kernel in this package's tiles (``tiled_logits_loss``)."""


class ReductionConfig(_Block):
    """``alst.reduction``: gradient averaging over ranks, used if sequence_parallel_size is above 1."""

    slice_bytes: Annotated[int, number_of("bytes")] = Field(default=2**26, ge=4096)
    """Bytes reduced at a time. The reduction needs at most twice that in addition to the gradients."""
    bucket_size: Annotated[Literal["auto"] | int | None, number_of("elements", "auto", None)] = None
    """Elements of DeepSpeed's gradient buckets, instead of its reduce_bucket_size; "auto" takes the spare memory."""


class OffloadConfig(_Block):
    """``alst.activation_checkpoint_cpu_offload`` as an object; ``true`` is an empty object."""

    nvme_path: StrictStr | None = Field(default=None, min_length=1)
    """Existing folder on a fast disk, for activations that exceed the host memory."""
    host_budget: Annotated[Literal["auto"] | int, number_of("bytes", "auto")] = "auto"
    """Bytes of a host's memory for the activations of all its ranks; "auto" is the spare memory of the host."""
    keep_last: StrictInt | None = Field(default=None, ge=0)
    """Last layers whose tensors stay on the device; unset means 1, or 0 if layers run in chunks."""
    packing: Annotated[Packing, one_of("lossless", "auto", False)] = False
    """Packing of bf16 tensors to 0.73 of their size: "lossless", false, or "auto": if the host lacks room otherwise."""


class MemoryLeanConfig(_Block):
    """``alst.memory_lean_layer`` as an object; ``true`` is an empty object."""

    chunk_tokens: StrictInt = Field(default=8192, ge=1)
    """Tokens of a rank's shard that a layer processes at a time."""
    tile_tokens: StrictInt = Field(default=2048, ge=1)
    """Tokens of a chunk whose graph exists at a time; a mixture's are whole chunks."""
    key_block: StrictInt = Field(default=65536, ge=1)
    """Keys of one kernel call, which bound what attention's kernel allocates for their gradients."""
    min_tokens: StrictInt = Field(default=0, ge=0)
    """Layers with fewer tokens of a shard than this run as without the key."""


class AutoMemoryLeanConfig(MemoryLeanConfig):
    """``alst.memory_lean_layer`` as ``"auto"``: where there are more than two chunks, and checkpoints to replace."""

    min_tokens: StrictInt = 2 * 8192 + 1


BLOCKS: dict[str, type[BaseModel]] = {
    "reduction": ReductionConfig,
    "tiled_mlp_compute": TiledMLPConfig,
    "tiled_logits_loss": TiledLossConfig,
    "liger_kernel": LigerConfig,
    "activation_checkpoint_cpu_offload": OffloadConfig,
    "memory_lean_layer": MemoryLeanConfig,
}
SWITCHES: dict[str, tuple[str, ...]] = {
    "tiled_mlp_compute": (),
    "tiled_logits_loss": ("auto", "torch", "triton", "liger"),
    "liger_kernel": ("auto",),
    "activation_checkpoint_cpu_offload": (),
    "save_attention_output": ("auto",),
    "memory_lean_layer": ("auto",),
}
"""Words that a switch takes besides true, false and, if it is in BLOCKS, an object."""


class AlstBlockConfig(_Block):
    """The ``alst`` block of a ds_config."""

    pad_to_multiple_of: Annotated[Literal["auto"] | int, number_of("tokens", "auto")] = "auto"
    """Multiple of tokens to which whole sequences are padded on the right; "auto" is 256 x SP."""
    expandable_segments: StrictBool | None = None
    """Expandable segments of the CUDA allocator; unset means on if there is CUDA."""
    reduction: ReductionConfig = Field(default_factory=ReductionConfig)
    """Slice size and bucket size of the gradient reduction."""
    tiled_mlp_compute: TiledMLPConfig | None = None
    """Tiling of MLPs and experts: true, false or an object."""
    tiled_logits_loss: TiledLossConfig | Literal["auto"] | None = "auto"
    """Tiling of logits and loss: true, "torch", "triton", "liger", false, an object, or "auto": on if sequences are
    sharded or Liger's loss is requested."""
    liger_kernel: LigerConfig | Literal["auto", True, False] = "auto"
    """Liger kernels: true, false, an object of parts, or "auto": on a GPU, if Liger supports the model."""
    activation_checkpoint_cpu_offload: OffloadConfig | None = None
    """Offload of checkpointed layer inputs to host and disk: true, false or an object. Enables checkpointing."""
    check_model: StrictBool = True
    """Comparison of the live model, unsharded against sharded, before the first step: true or false."""
    save_attention_output: bool | Literal["auto"] = "auto"
    """Attention output and log-sum-exp kept for the backward of checkpointed layers: true, false, or "auto": with the
    offload, if the copy overlaps with computation, in as many layers as the host has memory for."""
    memory_lean_layer: MemoryLeanConfig | None = None
    """Checkpointed decoder layers in chunks of tokens, keys and values resident: true, false, an object, or "auto":
    where activations are checkpointed, with SP or the offload, in shards of more than two chunks."""

    @field_validator(*SWITCHES, mode="before")
    @classmethod
    def _switch(cls, value: Any, info: Any) -> Any:
        """Turn the words of a switch into its object; raise ValueError for others."""
        words, block = SWITCHES[info.field_name], BLOCKS.get(info.field_name)
        if isinstance(value, bool):
            return value if block in (None, LigerConfig) else {} if value else None
        if isinstance(value, Mapping) and block:
            return value
        if value not in words:
            choices = ["true", "false", *map(shown, words)]
            choices += [f"an object of {', '.join(block.model_fields)}"] if block else []
            raise ValueError(f"use {', '.join(choices[:-1])}, or {choices[-1]}")
        if info.field_name == "memory_lean_layer":
            return AutoMemoryLeanConfig()
        return value if value == "auto" else {"backend": value}

    @field_validator("liger_kernel")
    @classmethod
    def _one_loss(cls, value: Any, info: Any) -> Any:
        """Raise ValueError if Liger's loss, a backend of tiled_logits_loss, contradicts it."""
        part, loss = getattr(value, "fused_linear_cross_entropy", None), info.data.get("tiled_logits_loss", "auto")
        backend = False if loss is None else getattr(loss, "backend", "auto")
        if part is not None and backend != "auto" and part != (backend == "liger"):
            raise ValueError(
                f"fused_linear_cross_entropy={shown(part)} contradicts tiled_logits_loss={shown(backend)}; leave one "
                "of them out"
            )
        return value


class AlstConfig(_Block):
    """All keys of a ds_config that this package acts on."""

    sequence_parallel_size: StrictInt = Field(default=1, ge=1)
    """SP degree: number of ranks that share one sequence. It divides the ranks; any number of query heads will do."""
    seq_parallel_communication_data_type: Annotated[ReductionDtype, BeforeValidator(_lowercase)] = "fp32"
    """Dtype of gradient sums under SP."""
    alst: AlstBlockConfig = Field(default_factory=AlstBlockConfig)
    """Block of this package's own keys."""

    def tiled_loss(self) -> TiledLossConfig | None:
        """Return the settings of tiled logits and loss; None if they are not tiled."""
        if self.alst.tiled_logits_loss != "auto":
            return self.alst.tiled_logits_loss
        liger = self.alst.liger_kernel
        asked = getattr(liger, "fused_linear_cross_entropy", liger) is True
        return TiledLossConfig() if self.sequence_parallel_size > 1 or asked else None

    def padding_multiple(self) -> int:
        """Return the padding multiple of whole sequences, in tokens; always a multiple of the SP degree."""
        multiple = self.alst.pad_to_multiple_of
        return 256 * self.sequence_parallel_size if multiple == "auto" else multiple


_UNIONS = ("tiled_logits_loss", "liger_kernel")  # pydantic inserts the chosen member into the error path
# Full paths of the inner blocks' keys.
_NESTED = {
    key: " or ".join(f"alst.{name}.{key}" for name, block in BLOCKS.items() if key in block.model_fields)
    for block in BLOCKS.values()
    for key in block.model_fields
}


def parse(ds_config: Mapping[str, Any]) -> AlstConfig:
    """Parse this package's keys of a ds_config.

    Raises:
        ConfigError: keys are unknown, out of range or unavailable; one line per key.
    """
    at_top = [key for key in TOP_KEYS if key in ds_config]
    problems = [*near_misses(ds_config, _NESTED)]
    given = {name: ds_config[name] for name in AlstConfig.model_fields if name in ds_config}
    if isinstance(block := ds_config.get("alst", {}), Mapping):
        given["alst"] = block_of(ds_config)
        problems += [f"{key}: also set as alst.{key}; leave one of them out." for key in at_top if key in block]
    try:
        config = AlstConfig.model_validate(given)
    except ValidationError as error:
        problems += [_line(each, at_top) for each in error.errors() if not _is_other_member(each)]
        raise ConfigError("\n".join(problems)) from None
    sp_size, multiple = config.sequence_parallel_size, config.padding_multiple()
    if multiple % sp_size:
        problems.append(
            f"alst.pad_to_multiple_of={shown(multiple)} is not a multiple of "
            f'sequence_parallel_size={shown(sp_size)}. Use {shown(-(-multiple // sp_size) * sp_size)}, or "auto".'
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def block_of(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``alst`` block merged with ALST's own names at the top level."""
    return {key: ds_config[key] for key in TOP_KEYS if key in ds_config} | dict(ds_config.get("alst") or {})


def _is_other_member(error: Any) -> bool:
    """Return True if a value that may be an object or "auto" is reported as not "auto"."""
    return error["type"] == "literal_error" and str(error["loc"][-1]).startswith("literal[")


def _line(error: Any, at_top: Sequence[str]) -> str:
    """Format one pydantic error, under the path that the user wrote."""
    loc = [str(part) for part in error["loc"]]
    if len(loc) > 2 and loc[1] in _UNIONS:
        del loc[2]
    unknown = error["type"] == "extra_forbidden"
    owner = loc[:-1] if unknown else loc
    block = BLOCKS.get(owner[1], AlstBlockConfig) if len(owner) > 1 else AlstBlockConfig
    words = [as_word(part) for part in loc[len(loc) > 1 and loc[1] in at_top :]]
    path, parent = ".".join(words), ".".join(words[:-1])
    if unknown:
        own = {name: f"{parent}.{name}" for name in block.model_fields}
        place = place_of(loc[-1], {**_NESTED, **OURS, **own})
        return correction(parent, loc[-1], place) if place else f"{path}: unknown key.{nearest(loc[-1], own)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = f"must be an object of {', '.join(block.model_fields)}"
    return f"{path}: {message} (got {shown(error['input'])})."
