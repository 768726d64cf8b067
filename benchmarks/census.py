"""Check all causal language models of transformers under sequence parallelism, on tiny models.

    python -m benchmarks.census [--write] [family ...]

Compares loss and all gradients of a tiny model per family, in fp32 on CPU: whole, over 2, 4 and 3 ranks, and packed
over 4. A correct family must also pass the check at training start, in fp32 and bf16, and be correct with memory-lean
layers over 2 ranks, or have none. ``--write`` writes the table to docs/census.md and adds to the list of verified
families. The exit status is non-zero if a family is wrong or crashes, a listed one is not right, or one times out,
possibly because the machine is busy.
"""

import argparse
import contextlib
import functools
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.figures import Figure, Part, markdown, report
from benchmarks.ranks import LateError, RankError, Ranks
from deepspeed_alst.attention.hf_attention import TRIAL
from deepspeed_alst.config.schema import MemoryLeanConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.mesh import build_control_group, build_groups
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.memory_lean.feature import run_in_chunks
from deepspeed_alst.memory_lean.layer import LeanCall
from deepspeed_alst.sequence_parallel.batch_check import check_batches
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.verification.hf_parity_trial import Verdict, compare
from deepspeed_alst.verification.hf_tiny_models import numel, shrink, small_model, trial_core
from deepspeed_alst.verification.model_check import check_live_model
from deepspeed_alst.verification.verify_model import VERIFIED_MODEL_TYPES, untouched

ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 600.0
# Keys that transformers' default configs lack for a valid model.
_INCOMPLETE: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 4, "clip_qkv": None},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16, "num_key_value_heads": 4},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 4},
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 64,
}
_ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
# Variants that a family's default config does not cover.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, dynamic RoPE": (
        "llama",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama, YaRN": ("llama", {"rope_parameters": _YARN}),
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64, "max_position_embeddings": 512},
    ),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "layer_types": None, "max_window_layers": 2},
    ),
    "mixtral, router loss": ("mixtral", {**_ROUTED, "sliding_window": None}),
    "qwen3_moe, router loss": ("qwen3_moe", _ROUTED),
    "olmoe, router loss": ("olmoe", _ROUTED),
}
# SP 3 does not divide the tiny models' heads; like packed sequences, it may be refused.
CELLS = (("SP 2", 2, False), ("SP 4", 4, False), ("SP 3", 3, False), ("packed, SP 4", 4, True))
COLUMNS = (*(name for name, _, _ in CELLS), "model check, SP 2", "memory-lean, SP 2")
_ORDINARY = "ordinary path: "
# Shards of 51 tokens: chunks of 20, 20 and 11.
_CHUNKS = MemoryLeanConfig(chunk_tokens=20, tile_tokens=8, key_block=31)


@dataclass(frozen=True)
class Row:
    """Verdicts of one family by cell."""

    name: str
    verdicts: tuple[Verdict, ...]

    @property
    def outcome(self) -> str:
        """Worst outcome; SP 3 and packed sequences may be refused."""
        found = [each.outcome for each in self.verdicts]
        for bad in ("crash", "wrong", "no answer"):
            if bad in found:
                return bad
        return "refused" if "refused" in found[:2] else found[0]

    @property
    def why(self) -> str:
        """Reasons of the cells that are not right, and of layers on the ordinary path."""
        reasons = (textwrap.shorten(each.why, 200, placeholder=" ...") for each in self.verdicts if each.why)
        return "; ".join(dict.fromkeys(reasons))


def small_of(name: str) -> tuple[Any, Any]:
    """Return a family's class and a tiny config, with sdpa if supported and no dropout."""
    family, changed = VARIANTS.get(name, (name, _INCOMPLETE.get(name, {})))
    config = CONFIG_MAPPING[family]()
    values = config.get_text_config().to_dict()
    still = {key: 0.0 for key, value in values.items() if re.search("dropout|_pdrop", key) and isinstance(value, float)}
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    if model_class.config_class is type(config.get_text_config()):
        config = config.get_text_config()
    small = shrink(config, **still, **changed)
    small._attn_implementation = trial_core(model_class)
    return model_class, small


@functools.cache
def _groups(sp_size: int) -> Any:
    return build_groups(sp_size, build_control_group())


def ask(name: str, sp_size: int, packed: bool) -> Verdict:
    """Return a family's verdict; runs on every rank."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        model_class, small = small_of(name)
        numel(model_class, small)
    except Exception as error:
        return Verdict("not built", f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")
    return compare(model_class, small, _groups(sp_size), packed)


def ask_check(name: str, dtype: torch.dtype) -> Verdict:
    """Return the verdict of the live model check on a tiny model; runs on every rank."""
    groups, calls = _groups(2), ForwardContext()
    model_class, small = small_of(name)
    model = small_model(model_class, small).to(dtype)
    model.config._attn_implementation = small._attn_implementation
    with PatchSet() as undo:
        patch_model(ModelSpec(model), groups.sp_control_group, undo, calls)
        check_batches(ModelSpec(model), groups, calls, undo)
        if calls.core == TRIAL:  # it has no unsplit run of its own
            calls.core = "eager"
        with untouched(model), torch.no_grad(), calls.of_model_check():
            try:
                check_live_model(ModelSpec(model), groups, calls, torch.device("cpu"))
            except UnsupportedModelError as error:
                return Verdict("wrong", f"in {dtype}: {error}")
    return Verdict("right")


def ask_in_chunks(name: str) -> Verdict:
    """Return a family's verdict with memory-lean layers, and the reason of those that run as without; on every rank."""
    (model_class, small), groups = small_of(name), _groups(2)
    reasons, layers = list[str](), 0

    def build(config: Any) -> Any:
        model = model_class(config)
        if model.supports_gradient_checkpointing:  # in the unsplit model too: its random numbers are a checkpoint's
            model.activation_checkpointing_enable({"use_reentrant": False})
        return model

    def patch(spec: ModelSpec, calls: ForwardContext, patches: PatchSet) -> None:
        nonlocal layers
        layers = sum(layer.gradient_checkpointing for layer in spec.checkpointed_layers)
        found = run_in_chunks(spec, _CHUNKS, groups.sp_control_group, calls, lambda layer: None, patches)
        reasons.extend(found[1] or ([] if layers else ["transformers checkpoints no layers of it"]))

    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch.object(LeanCall, "backward", autospec=True, side_effect=LeanCall.backward) as in_chunks,
    ):
        warnings.simplefilter("always")
        verdict = compare(build, small, groups, patch=patch)
    said = (str(each.message).partition("runs on the ordinary path: ")[2] for each in caught)
    reasons += dict.fromkeys(reason for reason in said if reason)
    if verdict.outcome != "right" or in_chunks.call_count == layers > 0:
        return verdict
    return replace(verdict, why=f"{_ORDINARY}{layers - in_chunks.call_count} of {layers} layers: {'; '.join(reasons)}")


def census(names: list[str]) -> Iterator[Row]:
    """Yield the verdicts of these families in sequence."""
    with contextlib.ExitStack() as opened:
        ranks = {size: opened.enter_context(Ranks(size)) for size in (3, 4)}
        for name in names:
            verdicts: list[Verdict] = []
            for _, sp_size, packed in CELLS:
                world_size = 3 if sp_size == 3 else 4
                try:
                    answers = ranks[world_size].run(ask, name, sp_size, packed, seconds=_SECONDS)
                    verdicts.append(answers[0])
                except RankError as error:
                    # Includes deadlocked ranks; to be repeated on an idle machine.
                    outcome = "no answer" if isinstance(error, LateError) else "crash"
                    verdicts.append(Verdict(outcome, str(error).strip().splitlines()[-1]))
                    ranks[world_size].close()
                    ranks[world_size] = opened.enter_context(Ranks(world_size))
                if Row(name, tuple(verdicts)).outcome != "right":
                    break
            if len(verdicts) == len(CELLS) and verdicts[-1].outcome in ("right", "refused"):
                checks = [ranks[4].run(ask_check, name, each)[0] for each in (torch.float32, torch.bfloat16)]
                verdicts.append(next((each for each in checks if each.outcome != "right"), checks[0]))
                verdicts.append(ranks[4].run(ask_in_chunks, name, seconds=_SECONDS)[0])
            yield Row(name, tuple(verdicts))


def cells_of(row: Row) -> list[str]:
    """Return a family's table cells: its error, or the outcome without a number, and why it is not right."""
    *compared, checked, lean = [*row.verdicts, *[None] * (len(COLUMNS) - len(row.verdicts))]
    *cells, in_chunks = [
        each and (f"{each.error:.0e}" if each.outcome == "right" else each.outcome) for each in (*compared, lean)
    ]
    passed = checked and ("passes" if checked.outcome == "right" else "fails")
    return [*(each or "" for each in (*cells, passed, in_chunks)), row.why]


def write(rows: list[Row]) -> None:
    """Write the table to docs/census.md and add the verified families to the list."""
    page = ROOT / "docs" / "census.md"
    head = page.read_text(encoding="utf-8").split("<!-- table -->")[0]
    models = [row for row in rows if row.name not in VARIANTS]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tally(models).items())
    counts = f"{len(models)} models: {counts}. Rows with a comma are variants of a model."
    table = markdown(["model_type", *COLUMNS, "why not"], ([row.name, *cells_of(row)] for row in rows))
    page.write_text(f"{head}<!-- table -->\n\n{counts}\n\n{table}", encoding="utf-8")
    right = sorted(
        VERIFIED_MODEL_TYPES | {row.name for row in rows if row.outcome == "right" and row.name not in VARIANTS}
    )
    listed = ROOT / "deepspeed_alst" / "verification" / "verify_model.py"
    names = textwrap.fill(" ".join(right), 120, break_on_hyphens=False)
    text = re.sub(
        r'(_FAMILIES = """\n).*?(\n""")', rf"\g<1>{names}\g<2>", listed.read_text(encoding="utf-8"), flags=re.S
    )
    listed.write_text(text, encoding="utf-8")


def tally(rows: list[Row]) -> dict[str, int]:
    """Count the rows of each outcome."""
    outcomes = [row.outcome for row in rows]
    counts = {each: outcomes.count(each) for each in ("right", "refused", "not built", "wrong", "crash", "no answer")}
    return {each: count for each, count in counts.items() if count or each != "no answer"}


def figures(names: list[str], writes: bool) -> Iterator[Figure]:
    """Yield the verdicts of the families, and their counts."""
    rows = []
    for row in census(names):
        rows.append(row)
        lost = row.name in VERIFIED_MODEL_TYPES and row.outcome not in ("right", "no answer")
        met = not lost and row.outcome not in ("wrong", "crash", "no answer")
        yield Figure(row.name, tuple(cells_of(row)), met=met, brief=False)
    if writes:
        write(rows)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tally(rows).items())
    yield Figure(counts, ("",) * (len(COLUMNS) + 1))


def main() -> int:
    """Print the table; return 1 if a family is wrong, crashes, or is no longer right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/census.md and the list of what is right")
    parser.add_argument("families", nargs="*", default=[*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])
    arguments = parser.parse_args()
    part = Part(lambda: figures(arguments.families, arguments.write), (*COLUMNS, "why not"))
    return report(__doc__, {"census": part}, ())


if __name__ == "__main__":
    sys.exit(main())
