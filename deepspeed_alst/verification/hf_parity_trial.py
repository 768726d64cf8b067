"""Check a model family numerically: one training step of a tiny model, unsharded and sharded, on CPU.

Every rank builds the same tiny model and the same random sequence, computes the loss and all gradients of the whole
sequence alone, then those of its shard with the other ranks. The census checks every family of transformers this way,
the start of a training run a model that the census has not found right.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import shard_batch
from deepspeed_alst.distributed.collectives import gather_objects
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import AlstError, UnsupportedModelError
from deepspeed_alst.random_draws.model_draws import Draws, count_draws, without_dropout
from deepspeed_alst.sequence_parallel.batch_check import check_batches
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.hf_attention import TRIAL, find_backend
from deepspeed_alst.verification.hf_support_checks import check_model
from deepspeed_alst.verification.hf_tiny_models import draw_weights, shrink
from deepspeed_alst.verification.program_code import check_custom_modules, install_program_code

# In fp32 the two steps differ by 1e-7 to 1e-5; a wrong one is off by 1% or more.
_MOST = 3e-4
# Share of all gradients' norm; less is rounding, e.g. for a key bias, which softmax cancels.
_NOTHING = 1e-4
_LARGEST = 2**25  # parameters; each rank holds several fp32 copies
_TERM = (
    " If it adds a term to the loss: made of logits or hidden states it is one of a shard's tokens. Add it in the "
    "training loop, to outputs.loss (README, Limits, says how), or make it of parameters alone."
)
LENGTH = 101
"""Tokens of the sequence: more than any window of a tiny config, and a prime."""
DOCUMENTS = (37, 1, 30, 33)
"""Lengths of the packed documents: they end inside shards, and one is a single token."""

Build = Callable[[PreTrainedConfig], PreTrainedModel]


@dataclass(frozen=True)
class Verdict:
    """Outcome of a comparison; the same on all ranks."""

    outcome: str
    """``right``, ``refused``, ``wrong`` or ``crash``."""
    why: str = ""
    """Message of a refusal or a crash, or the name with the largest error."""
    error: float = 0.0
    """Largest relative error of the loss and of any parameter's gradient."""


def check_tiny_model(spec: ModelSpec, groups: SequenceGroups, unlisted: str, code: tuple[str, ...]) -> str:
    """Raise unless a tiny model of a model's kind is right; return a summary. Collective over the gloo groups.

    ``code`` names the program's own code in the model.

    Raises:
        UnsupportedModelError: the tiny model is not right; on all ranks. The message begins with ``unlisted``.
    """
    base, way_out = spec.model, "Set sequence_parallel_size to 1, or train one of those"
    try:
        # The core draws attention dropout itself, per document.
        small = without_dropout(shrink(base.config), attention_only=True)
        small._attn_implementation = trial_core(type(base))
    except Exception as error:
        raise UnsupportedModelError(
            f"{unlisted}, and no small config of its kind could be made: {_words(error)}. {way_out}."
        ) from error

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        return install_program_code(spec, type(base)(config))

    whole = compare(build, small, groups)
    packed = compare(build, small, groups, packed=True) if whole.outcome == "right" else whole
    # A packed batch refused here raises no error yet: training refuses it too.
    for verdict, batch in ((whole, "sequence"), (packed, "packed sequence")):
        if verdict.outcome in ("wrong", "crash") or (verdict.outcome == "refused" and verdict is whole):
            hint = _TERM if code and verdict.outcome == "wrong" else ""
            raise UnsupportedModelError(
                f"{unlisted}, and a small model of its kind is {verdict.outcome} there on a {batch}: "
                f"{verdict.why.rstrip('.')}.{hint} {way_out}."
            )
    check_custom_modules(base, small_model(build, small))
    return f"a small model of its kind is right to {whole.error:.0e}; packed: {packed.outcome}"


def trial_core(model_class: type[PreTrainedModel]) -> str:
    """Return the attention implementation of a trial on CPU; it gets the same inputs as the GPU's cores."""
    if model_class._supports_sdpa:
        return "sdpa"
    return TRIAL if model_class._supports_flash_attn or model_class._supports_flex_attn else "eager"


def compare(build: Build, config: PreTrainedConfig, groups: SequenceGroups, packed: bool = False) -> Verdict:
    """Compare one training step unsharded and sharded over ``groups``. Collective over their gloo groups.

    Args:
        build: builds the model from a config.
        config: tiny config, with the attention implementation under test.
        groups: process groups of the sequence.
        packed: if True the sequence consists of several documents.
    """
    batch = _sample(config, packed)
    try:
        if (size := numel(build, config)) > _LARGEST:
            return Verdict("refused", f"its small model has {size:,} parameters, too many for a trial")
        truth = _whole_step(small_model(build, config), [(batch, 1.0)])
    except Exception as error:
        return Verdict("refused", f"it cannot be trained on {LENGTH} tokens on CPU at all: {_words(error)}")
    mine: Any = None
    failure = None
    try:
        small = small_model(build, config)
        small.config._attn_implementation = config._attn_implementation
        mine = _split_step(small, batch, groups)
    except Exception as error:
        refused = isinstance(error, AlstError)
        failure = Verdict("refused", str(error)) if refused else Verdict("crash", _words(error))
    failures = [each for each in gather_objects(failure, groups.sp_control_group) if each is not None]
    if failures:
        return next((each for each in failures if each.outcome == "crash"), failures[0])
    verdict = _judge(truth, mine, groups)
    if verdict.outcome == "wrong" and packed:
        # A model may attend across packed documents, which is no reference; then each document runs alone.
        verdict = _judge(_whole_step(small_model(build, config), _documents(batch)), mine, groups)
    if verdict.outcome == "wrong":
        again = _whole_step(small_model(build, config), [(batch, 1.0)], seed=1)
        if any(not torch.equal(again[name], value) for name, value in truth.items()):
            return Verdict("refused", "its training draws random numbers, which ranks cannot draw alike")
    return verdict


def _build(build: Build, config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)
    if config._attn_implementation == TRIAL:
        config._attn_implementation = "eager"  # its reference
    return build(config)


def numel(build: Build, config: PreTrainedConfig) -> int:
    """Count the parameters of a model, on the meta device if it can be built there."""
    try:
        with torch.device("meta"):
            model = _build(build, config)
    except Exception:  # it reads values when it is built
        model = _build(build, config)
    return sum(param.numel() for param in model.parameters())


def small_model(build: Build, config: PreTrainedConfig) -> torch.nn.Module:
    """Build a tiny model with the same weights on every rank, random enough for sizable gradients."""
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(0)
        model = _build(build, config).float()
        draw_weights(model)
    return model.train()


def _sample(config: PreTrainedConfig, packed: bool) -> dict[str, torch.Tensor]:
    """Draw one sequence of random tokens, every seventh without a label."""
    make = torch.Generator().manual_seed(3)
    vocab = config.get_text_config().vocab_size
    ids = torch.randint(min(5, vocab - 1), vocab - 8, (1, LENGTH), generator=make)
    labels = ids.clone()
    labels[:, ::7] = IGNORED_LABEL
    batch = {"input_ids": ids, "labels": labels}
    if packed:
        batch["position_ids"] = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
        labels[batch["position_ids"] == 0] = IGNORED_LABEL  # as packing collators do
    return batch


def _documents(batch: dict[str, torch.Tensor]) -> list[tuple[dict[str, Any], float]]:
    """Return each packed document with labels, and its share of all labels."""
    places = itertools.pairwise(itertools.accumulate(DOCUMENTS, initial=0))
    parts = [{key: batch[key][:, slice(*place)] for key in ("input_ids", "labels")} for place in places]
    counts = [int((each["labels"][:, 1:] != IGNORED_LABEL).sum()) for each in parts]
    return [(part, count / sum(counts)) for part, count in zip(parts, counts, strict=True) if count]


def _whole_step(
    model: torch.nn.Module, batches: list[tuple[dict[str, Any], float]], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Run ``_step`` on an unsharded model, with the random numbers that its ranks would draw."""
    with PatchSet() as patches:
        count_draws(ModelSpec(model), Draws(), patches)
        return _step(model, batches, seed)


def _step(
    model: torch.nn.Module, batches: list[tuple[dict[str, Any], float]], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return the sum of the batches' losses times their factors, and its gradients by name."""
    total = torch.zeros(())
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for batch, factor in batches:
            loss = model(**batch, use_cache=False).loss * factor
            loss.backward()
            total += loss.detach()
    return {"loss": total} | {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def _split_step(model: torch.nn.Module, batch: dict[str, Any], groups: SequenceGroups) -> dict[str, torch.Tensor]:
    spec = ModelSpec(model)
    check_model(spec)
    P, calls = groups.sp_size, ForwardContext()
    packing = find_backend(spec.config._attn_implementation) is not None
    cut = shard_batch(batch, P, P, packing, bool(spec.router_classes))
    with PatchSet() as patches:
        patch_model(spec, groups.sp_control_group, patches, calls)
        check_batches(spec, groups, calls, patches)
        return _step(model, [({**cut.shards[groups.sp_rank], **cut.common}, 1.0)])


def _judge(truth: dict[str, torch.Tensor], mine: dict[str, torch.Tensor], groups: SequenceGroups) -> Verdict:
    worst, place = 0.0, "the loss"
    nothing = _NOTHING * math.sqrt(
        sum(float(grad.double().norm()) ** 2 for name, grad in truth.items() if name != "loss")
    )
    for name, whole in truth.items():
        found = mine.get(name, torch.zeros_like(whole)).double()
        if name != "loss":  # as DeepSpeed averages gradients
            dist.all_reduce(found, group=groups.sp_control_group)
            found /= groups.sp_size
        size = float(whole.double().norm())
        error = float((found - whole).norm()) / (size if name == "loss" else max(size, nothing))
        if not error <= worst:
            worst, place = error, name
    if worst <= _MOST:
        return Verdict("right", error=worst)
    return Verdict("wrong", f"{place} is off by {worst:.1e}", worst)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
