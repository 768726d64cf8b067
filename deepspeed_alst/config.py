"""The JSON's interface: what of a ds_config belongs to this package, parsed, checked, frozen. Pure: no torch, no I/O.

``parse`` checks the keys by themselves, ``check_world`` against the number of ranks, ``check_heads`` against the model.
Each reports everything it finds in one ConfigError, a line per key: JSON path, value, way out.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deepspeed_alst.errors import ConfigError

ReductionDtype = Literal["fp32", "bf16", "fp16"]

# Keys of the alst block whose feature is not in this version, with the values that ask for nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "reduction": ({},),
    "liger_kernel": (False, "auto"),
    "activation_checkpoint_cpu_offload": (False,),
    "save_attention_output": (False, "auto"),
    "memory_lean_layer": (False,),
}


def _bytes_or_auto(value: Any) -> Any:
    """A number of bytes, which JSON may write as 5e8."""
    if value == "auto":
        return value
    if type(value) not in (int, float) or value < 1 or value != int(value):
        raise ValueError("must be a positive number of bytes, or 'auto'")
    return int(value)


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
        return _bytes_or_auto(value)


class TiledLossBlock(BaseModel):
    """``alst.tiled_logits_loss`` as an object; ``true`` and ``"torch"`` are an empty one."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tile_tokens: int | None = Field(default=None, ge=1, strict=True)
    """Labelled tokens of a tile. Unset means as many as fit into tile_bytes."""

    tile_bytes: int = Field(default=2**30, ge=1)
    """What one tile of logits may need, with what is made of it; a tile has at least 64 tokens."""


class AlstBlock(BaseModel):
    """The ``alst`` block of a ds_config."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    pad_to_multiple_of: Literal["auto"] | int = "auto"
    """Whole sequences are padded on the right to a multiple of this many tokens; "auto" is 256 x SP."""

    expandable_segments: bool | None = None
    """The CUDA allocator's expandable segments; unset means on wherever there is CUDA."""

    reduction: dict = Field(default_factory=dict)
    """Slices and bucket size of the gradient reduction. Not available in this version."""

    tiled_mlp_compute: TiledMlpBlock | None = None
    """MLPs and experts tile by tile: true, false or an object."""

    tiled_logits_loss: TiledLossBlock | Literal["auto"] | None = "auto"
    """Logits and loss tile by tile: true, "torch", false, an object, or "auto": where sequences are split."""

    liger_kernel: Any = "auto"
    """Liger's kernels. Not available in this version; "auto" leaves them off."""

    activation_checkpoint_cpu_offload: Any = False
    """Checkpointed layer inputs on the host. Not available in this version."""

    save_attention_output: Any = "auto"
    """Attention's output kept for the backward. Not available in this version; "auto" leaves it off."""

    memory_lean_layer: Any = False
    """The memory-lean layer schedule. Not available in this version."""

    @field_validator("pad_to_multiple_of", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError("must be a positive number of tokens, or 'auto'")
        return value

    @field_validator("tiled_mlp_compute", mode="before")
    @classmethod
    def _tiled_mlp(cls, value: Any) -> Any:
        if not isinstance(value, bool | Mapping):
            raise ValueError("use true, false, or an object of tile_tokens, tile_bytes, min_tokens, fp32_accumulation")
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("tiled_logits_loss", mode="before")
    @classmethod
    def _tiled_loss(cls, value: Any) -> Any:
        if value in ("liger", "triton"):
            raise ValueError("its kernels are not yet available in this version of deepspeed_alst; use 'torch'")
        if isinstance(value, bool) or value == "torch":
            return {} if value else None
        if value != "auto" and not isinstance(value, Mapping):
            raise ValueError("use true, false, 'auto', 'torch', or an object of tile_bytes")
        return value

    @field_validator(*_NOT_YET)
    @classmethod
    def _not_yet(cls, value: Any, info: Any) -> Any:
        idle = _NOT_YET[info.field_name]
        if not any(type(value) is type(ok) and value == ok for ok in idle):
            shown = " or ".join(repr(ok) for ok in idle)
            raise ValueError(
                f"not yet available in this version of deepspeed_alst; remove the key, or set it to {shown}"
            )
        return value


_BLOCKS: dict[str, type[BaseModel]] = {"tiled_mlp_compute": TiledMlpBlock, "tiled_logits_loss": TiledLossBlock}


class AlstConfig(BaseModel):
    """Everything in a ds_config that this package acts on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sequence_parallel_size: int = Field(default=1, ge=1, strict=True)
    """SP degree: how many ranks share one sequence."""

    seq_parallel_communication_data_type: ReductionDtype = "fp32"
    """What gradients are summed in under SP."""

    alst: AlstBlock = Field(default_factory=AlstBlock)
    """The block of this package's own keys."""

    @field_validator("seq_parallel_communication_data_type", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        # DeepSpeed lowers it too (deepspeed.runtime.config.get_communication_data_type).
        text = value.lower() if isinstance(value, str) else value
        if not isinstance(text, str) or text not in get_args(ReductionDtype):
            raise ValueError(f"use one of {', '.join(get_args(ReductionDtype))}")
        return text

    def tiled_loss(self) -> TiledLossBlock | None:
        """The settings of tiled logits and loss; None where they stay whole."""
        if self.alst.tiled_logits_loss == "auto":
            return TiledLossBlock() if self.sequence_parallel_size > 1 else None
        return self.alst.tiled_logits_loss

    def padding_multiple(self) -> int:
        """Tokens that a whole sequence is padded to a multiple of; always a multiple of the SP degree."""
        if self.alst.pad_to_multiple_of == "auto":
            return 256 * self.sequence_parallel_size
        return self.alst.pad_to_multiple_of


def parse(ds_config: Mapping[str, Any]) -> AlstConfig:
    """Read this package's keys out of a ds_config.

    Raises:
        ConfigError: any of them is unknown, out of range or not available; one line for each.
    """
    problems = _misplaced_keys(ds_config)
    given = {name: ds_config[name] for name in AlstConfig.model_fields if name in ds_config}
    try:
        config = AlstConfig.model_validate(given)
    except ValidationError as error:
        # Of a value that may also be "auto", pydantic says that it is not that either.
        problems += [_line(each) for each in error.errors() if each["type"] != "literal_error"]
        raise ConfigError("\n".join([*problems, *_padding_problem(ds_config)])) from None
    problems += _padding_problem(ds_config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _padding_problem(ds_config: Mapping[str, Any]) -> list[str]:
    """Of the raw values: it is to be said beside whatever else is wrong."""
    block, sp_size = ds_config.get("alst"), ds_config.get("sequence_parallel_size", 1)
    multiple = block.get("pad_to_multiple_of", "auto") if isinstance(block, Mapping) else "auto"
    if type(multiple) is not int or type(sp_size) is not int or multiple < 1 or sp_size < 1 or not multiple % sp_size:
        return []
    return [
        f"alst.pad_to_multiple_of={multiple} is not a multiple of sequence_parallel_size={sp_size}. "
        f"Use {-(-multiple // sp_size) * sp_size}, or 'auto'."
    ]


def check_world(config: AlstConfig, world_size: int) -> None:
    """Refuse an SP degree that does not divide the number of ranks.

    Raises:
        ConfigError: with the degrees that would do.
    """
    sp_size = config.sequence_parallel_size
    if world_size % sp_size:
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(
            f"sequence_parallel_size={sp_size} does not divide the world size ({world_size} ranks). "
            f"Use one of {fitting}."
        )


def check_heads(config: AlstConfig, num_heads: int, num_kv_heads: int) -> None:
    """Refuse an SP degree that cannot split these heads.

    Raises:
        ConfigError: SP does not divide the query heads, or neither of SP and the kv heads divides the other; with
            the degrees that would do.
    """
    sp_size = config.sequence_parallel_size

    def fits(n: int) -> bool:
        return num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)

    if fits(sp_size):
        return
    if num_heads % sp_size:
        why = f"does not divide the model's {num_heads} query heads"
        if sp_size > num_heads:
            why = f"is more than the model's {num_heads} query heads"
    else:
        why = f"and the model's {num_kv_heads} key/value heads do not divide one another"
    fitting = [n for n in range(1, num_heads + 1) if fits(n)]
    raise ConfigError(
        f"sequence_parallel_size={sp_size} {why}. Use one of {fitting}; "
        f"the remaining ranks form data-parallel replicas by themselves."
    )


def nearest(name: str, known: Any) -> str:
    """The sentence that names the closest known key, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""


def _line(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"] if part != TiledLossBlock.__name__)
    if error["type"] == "extra_forbidden" and error["loc"][-1] in AlstConfig.model_fields:
        return f"{path}: belongs at the top level of the ds_config, as {error['loc'][-1]}."
    if error["type"] == "extra_forbidden":
        known = (
            _BLOCKS.get(str(error["loc"][1]), AlstBlock).model_fields
            if len(error["loc"]) > 2
            else AlstBlock.model_fields
        )
        return f"{path}: unknown key.{nearest(error['loc'][-1], known)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (got {error['input']!r})."


def _misplaced_keys(ds_config: Mapping[str, Any]) -> list[str]:
    """Top-level keys that are this package's, misspelt or out of place: DeepSpeed ignores what it does not know."""
    lines = []
    for key in ds_config:
        if key in AlstBlock.model_fields:
            lines.append(f"{key}: belongs into the alst block, as alst.{key}.")
        elif key not in AlstConfig.model_fields:
            # communication_data_type, a key of DeepSpeed's, is 0.78 of seq_parallel_communication_data_type; 'aslt' is
            # 0.75 of 'alst', and nothing of DeepSpeed's is near that.
            near = [
                name for name in AlstConfig.model_fields if _similarity(key, name) > (0.85 if len(name) > 4 else 0.7)
            ]
            lines += [f"{key}: unknown key. Did you mean '{name}'?" for name in near[:1]]
    return lines


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, str(one), other).ratio()
