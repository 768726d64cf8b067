"""This package's part of a ds_config: parsed, checked, frozen. Pure: no torch, no I/O.

``parse`` checks the keys alone, ``check_world`` against the number of ranks, ``check_heads`` against the model. Each
reports all problems in one ConfigError, a line per key: JSON path, value, remedy.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deepspeed_alst.blocks import AlstBlock, LigerBlock, OffloadBlock, ReductionBlock, TiledLossBlock, TiledMlpBlock
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.near_misses import DEEPSPEED_KEYS, OURS, TOP_KEYS, near_misses, place_of
from deepspeed_alst.words import as_word, shown

ReductionDtype = Literal["fp32", "bf16", "fp16"]

_BLOCKS: dict[str, type[BaseModel]] = {
    "reduction": ReductionBlock,
    "tiled_mlp_compute": TiledMlpBlock,
    "tiled_logits_loss": TiledLossBlock,
    "liger_kernel": LigerBlock,
    "activation_checkpoint_cpu_offload": OffloadBlock,
}


# Union types: pydantic inserts the chosen member into the error path.
_UNIONS = ("tiled_logits_loss", "liger_kernel")
# Deeper than any block of DeepSpeed's. Python copies, compares and prints recursively, up to about 1000 levels.
_DEEPEST = 100
# This package's keys are less than half as long; comparison time is quadratic.
_LONGEST_NAME = 100

# Full paths of the inner blocks' keys.
_NESTED = {
    key: " or ".join(f"alst.{name}.{key}" for name, block in _BLOCKS.items() if key in block.model_fields)
    for block in _BLOCKS.values()
    for key in block.model_fields
}

# Ranks with different values of these keys would deadlock or diverge.
SAME_ON_ALL_RANKS = (
    "sequence_parallel_size",
    "seq_parallel_communication_data_type",
    "alst",
    *TOP_KEYS,
    "zero_optimization",
    "data_types",
    "bf16",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


class AlstConfig(BaseModel):
    """All keys of a ds_config that this package acts on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sequence_parallel_size: int = Field(default=1, ge=1, strict=True)
    """SP degree: number of ranks that share one sequence."""

    seq_parallel_communication_data_type: ReductionDtype = "fp32"
    """Dtype of gradient sums under SP."""

    alst: AlstBlock = Field(default_factory=AlstBlock)
    """Block of this package's own keys."""

    @field_validator("sequence_parallel_size", mode="before")
    @classmethod
    def _degree(cls, value: Any) -> Any:
        if type(value) is int and value >= 1:
            return value
        number = value if type(value) is float else int(value) if isinstance(value, str) and value.isdigit() else 0
        if 1 <= number < 2**31 and number == int(number):
            raise ValueError(f"write it as {int(number)}, a whole number without quotes or a point")
        raise ValueError("must be the number of ranks that share a sequence, such as 8; 1 is none, nothing fills it in")

    @field_validator("seq_parallel_communication_data_type", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        # DeepSpeed lowercases it too (deepspeed.runtime.config.get_communication_data_type).
        text = value.lower() if isinstance(value, str) else value
        if not isinstance(text, str) or text not in get_args(ReductionDtype):
            raise ValueError(f"use one of {', '.join(get_args(ReductionDtype))}")
        return text

    def tiled_loss(self) -> TiledLossBlock | None:
        """Return the settings of tiled logits and loss; None if they are not tiled."""
        if self.alst.tiled_logits_loss == "auto":
            liger = self.alst.liger_kernel
            asked = liger if isinstance(liger, bool) else getattr(liger, "fused_linear_cross_entropy", None)
            return TiledLossBlock() if self.sequence_parallel_size > 1 or asked is True else None
        return self.alst.tiled_logits_loss

    def padding_multiple(self) -> int:
        """Return the padding multiple of whole sequences, in tokens; always a multiple of the SP degree."""
        if self.alst.pad_to_multiple_of == "auto":
            return 256 * self.sequence_parallel_size
        return self.alst.pad_to_multiple_of


def parse(ds_config: Mapping[str, Any]) -> AlstConfig:
    """Parse this package's keys of a ds_config.

    Raises:
        ConfigError: keys are unknown, out of range or unavailable; one line per key.
    """
    if (bottom := _too_deep(ds_config)) is not None:
        raise ConfigError(f"{bottom}: objects and lists lie more than {_DEEPEST} deep in one another.")
    beside = [key for key in TOP_KEYS if key in ds_config]
    block = ds_config.get("alst")
    problems = [*near_misses(ds_config, _NESTED)]
    problems += [
        f"{key}: stands in the alst block too, as alst.{key}; leave one of them out."
        for key in beside
        if isinstance(block, Mapping) and key in block
    ]
    given = {name: ds_config[name] for name in AlstConfig.model_fields if name in ds_config}
    if beside and ("alst" not in ds_config or isinstance(block, Mapping)):
        given["alst"] = block_of(ds_config)
    try:
        config = AlstConfig.model_validate(given)
    except ValidationError as error:
        # For a value that may be "auto", pydantic also reports that it is not "auto".
        problems += [_line(each, beside) for each in error.errors() if each["type"] != "literal_error"]
        raise ConfigError("\n".join([*problems, *_padding_problem(ds_config)])) from None
    problems += _padding_problem(ds_config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def block_of(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``alst`` block merged with ALST's own names at the top level."""
    return {key: ds_config[key] for key in TOP_KEYS if key in ds_config} | dict(ds_config.get("alst") or {})


def _padding_problem(ds_config: Mapping[str, Any]) -> list[str]:
    """Check the padding multiple on raw values, so that it is reported along with other problems."""
    block, sp_size = ds_config.get("alst"), ds_config.get("sequence_parallel_size", 1)
    multiple = block.get("pad_to_multiple_of", "auto") if isinstance(block, Mapping) else "auto"
    if type(multiple) is not int or type(sp_size) is not int or multiple < 1 or sp_size < 1 or not multiple % sp_size:
        return []
    return [
        f"alst.pad_to_multiple_of={shown(multiple)} is not a multiple of sequence_parallel_size={shown(sp_size)}. "
        f'Use {shown(-(-multiple // sp_size) * sp_size)}, or "auto".'
    ]


def _too_deep(ds_config: Mapping[str, Any]) -> str | None:
    """Return the path of a value nested too deep, or None. Iterative, as it guards against recursion."""
    level: list[tuple[str, Any]] = [(as_word(str(key)), value) for key, value in ds_config.items()]
    for _ in range(_DEEPEST):
        # Only a path's start is kept: it locates the value, and names may be long.
        level = [
            (f"{path}.{as_word(str(key))}" if len(path) < _LONGEST_NAME else path, inner)
            for path, value in level
            if isinstance(value, Mapping | list | tuple)
            for key, inner in (value.items() if isinstance(value, Mapping) else enumerate(value))
        ]
        if not level:
            return None
    return level[0][0]


def fits_heads(degree: int, num_heads: int, num_kv_heads: int) -> bool:
    """Return True if an SP degree can split these heads."""
    return num_heads % degree == 0 and (num_kv_heads % degree == 0 or degree % num_kv_heads == 0)


def check_world(config: AlstConfig, world_size: int, heads: Iterable[tuple[int, int, str]] = ()) -> None:
    """Raise ConfigError if the SP degree does not divide the number of ranks.

    Args:
        config: this package's config.
        world_size: number of ranks.
        heads: heads, KV heads and their owner, if known.

    Raises:
        ConfigError: with the valid degrees.
    """
    sp_size = config.sequence_parallel_size
    if world_size % sp_size:
        known = [*heads]
        fitting = [
            n for n in range(1, world_size + 1) if not world_size % n and all(fits_heads(n, a, b) for a, b, _ in known)
        ]
        raise ConfigError(
            f"sequence_parallel_size={shown(sp_size)} does not divide the world size ({world_size} ranks). "
            f"Use one of {fitting}."
        )


def check_heads(
    config: AlstConfig, num_heads: int, num_kv_heads: int, of: str = "attention", world_size: int = 0
) -> None:
    """Raise ConfigError if the SP degree cannot split these heads, of attention or a scan.

    Raises:
        ConfigError: SP does not divide the query heads, or neither of SP and the KV heads divides the other; with the
            valid degrees for ``world_size`` ranks.
    """
    sp_size = config.sequence_parallel_size
    heads, shared = ("query heads", "key/value heads") if of == "attention" else (f"heads of a {of}", "groups of them")

    if fits_heads(sp_size, num_heads, num_kv_heads):
        return
    if num_heads % sp_size:
        why = f"does not divide the model's {num_heads} {heads}"
        if sp_size > num_heads:
            why = f"is more than the model's {num_heads} {heads}"
    else:
        why = f"and the model's {num_kv_heads} {shared} do not divide one another"
    # A world size of 0 (unknown) allows every degree.
    fitting = [n for n in range(1, num_heads + 1) if not world_size % n and fits_heads(n, num_heads, num_kv_heads)]
    raise ConfigError(
        f"sequence_parallel_size={shown(sp_size)} {why}. Use one of {fitting}; "
        f"the remaining ranks form data-parallel replicas by themselves."
    )


def nearest(name: str, known: Any) -> str:
    """Return a sentence with the closest known key, or with all of them."""
    found = difflib.get_close_matches(name[:_LONGEST_NAME], list(known), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else f" Known are {', '.join(known)}."


def _line(error: Any, beside: Sequence[str] = ()) -> str:
    """Format one pydantic error; keys in ``beside`` are at the top level."""
    loc = [str(part) for part in error["loc"]]
    if len(loc) > 2 and loc[1] in _UNIONS:
        del loc[2]
    path = ".".join(as_word(part) for part in loc[len(loc) > 1 and loc[1] in beside :])
    if error["type"] == "extra_forbidden":
        block = _BLOCKS.get(loc[1], AlstBlock) if len(loc) > 2 else AlstBlock
        return f"{path}: {_unknown(loc[-1], block)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        block = _BLOCKS.get(path.removeprefix("alst."), AlstBlock)
        message = f"must be an object of {', '.join(block.model_fields)}"
    return f"{path}: {message} (got {shown(error['input'])})."


def _unknown(key: str, block: type[BaseModel]) -> str:
    """Return a hint about the right place of a key that a block does not know."""
    place = place_of(key, OURS) or ""
    if key in AlstConfig.model_fields or key in DEEPSPEED_KEYS:
        return f"belongs at the top level of the ds_config, as {key}."
    if block is AlstBlock and key in _NESTED:
        return f"belongs into a block of its own, as {_NESTED[key]}."
    if place and place.removeprefix("alst.") not in ("alst", *AlstBlock.model_fields):
        return f"unknown key. Did you mean '{place}', outside of the alst block?"
    return f"unknown key.{nearest(key, block.model_fields)}"
