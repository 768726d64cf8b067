"""Is a model right under sequence parallelism? A small model of its kind is trained for one step both ways, on CPU.

Every rank makes the same small model (shrink.py) and the same random sequence, takes the loss and all gradients of the
whole sequence by itself, and then with the other ranks those of its shard. The census asks this of every family that
transformers knows; at the start of a training it is asked of a model that no census has found right.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.shard import shard_batch
from deepspeed_alst.errors import AlstError, UnsupportedModelError
from deepspeed_alst.models.batch_guard import guard_batches
from deepspeed_alst.models.calls import Calls
from deepspeed_alst.models.cores import TRIAL, keeps_documents_apart
from deepspeed_alst.models.dropout import Draws, count_draws, without_dropout
from deepspeed_alst.models.experts import router_classes
from deepspeed_alst.models.families import check_model
from deepspeed_alst.models.foreign import check_own_modules, own_modules
from deepspeed_alst.models.gradient_hooks import check_gradient_hooks
from deepspeed_alst.models.patches import patch_model
from deepspeed_alst.models.program_code import install_program_code, program_code
from deepspeed_alst.models.shrink import shrink
from deepspeed_alst.models.verified import RIGHT
from deepspeed_alst.models.wrapped import base_model
from deepspeed_alst.parallel.agreement import gather_objects
from deepspeed_alst.parallel.groups import SequenceGroups
from deepspeed_alst.parallel.loss import IGNORED_LABEL

# In fp32 the two ways differ by 1e-7 to 1e-5, and what is wrong is off by a percent and more.
_MOST = 3e-4
# Of the norm of all gradients: what is less is rounding, as of a bias of keys, which softmax does not see.
_NOTHING = 1e-4
_LARGEST = 2**25  # parameters, which each rank has several times in fp32
LENGTH = 101
"""Longer than every window of a small config, and a multiple of nothing."""
DOCUMENTS = (37, 1, 30, 33)
"""Of a packed sequence: they end inside of shards, and one is a single token."""

Build = Callable[[PreTrainedConfig], PreTrainedModel]


@dataclass(frozen=True)
class Verdict:
    """What came of a comparison; the same on all ranks."""

    outcome: str
    """``right``, ``refused``, ``wrong`` or ``crash``."""
    why: str = ""
    """Of a refusal or a crash its words; of what is wrong the worst place."""
    error: float = 0.0
    """The largest relative error of the loss and of any parameter's gradient."""


def prove(model: torch.nn.Module, groups: SequenceGroups, adopted: bool = False) -> str:
    """Let a model through whose family the census found right, or a small one of whose kind is right here.

    Collective over the groups' gloo groups, and a matter of seconds for a model that is not listed. In an ``adopted``
    program, written for DeepSpeed's own ALST, the code that it has put into the model is what this package takes over.

    Returns:
        What was found, in words; empty for a listed one.

    Raises:
        UnsupportedModelError: on all ranks alike.
    """
    check_gradient_hooks(model)
    base, code = base_model(model), program_code(model)
    # Modules that it has put in are tried by themselves (foreign.py): a small model would not have them.
    put_in = {f"{cls.__module__}.{cls.__qualname__}" for cls in map(type, own_modules(base).values())}
    code = () if adopted else tuple(each for each in code if each not in put_in)
    if base.config.model_type in RIGHT and not code:
        check_own_modules(base, None)
        return ""
    unlisted = (
        f"{type(base).__name__} (model_type='{base.config.model_type}') is none of the {len(RIGHT)} families that are "
        "verified under sequence parallelism (docs/census.md)"
    )
    if base.config.model_type in RIGHT:
        unlisted = f"{type(base).__name__} runs code of the program's own ({', '.join(code[:4])})"
    way_out = "Set sequence_parallel_size to 1, or train one of those"
    try:
        # Attention's is the core's, which draws it by document.
        small = without_dropout(shrink(base.config), attention_only=True)
        small._attn_implementation = trial_core(type(base))
    except Exception as error:
        raise UnsupportedModelError(
            f"{unlisted}, and no small config of its kind could be made: {_words(error)}. {way_out}."
        ) from error

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        return install_program_code(model, type(base)(config))

    whole = compare(build, small, groups)
    packed = compare(build, small, groups, packed=True) if whole.outcome == "right" else whole
    # A packed batch that is refused here is refused in the training too.
    for verdict, batch in ((whole, "sequence"), (packed, "packed sequence")):
        if verdict.outcome in ("wrong", "crash") or (verdict.outcome == "refused" and verdict is whole):
            raise UnsupportedModelError(
                f"{unlisted}, and a small model of its kind is {verdict.outcome} there on a {batch}: "
                f"{verdict.why.rstrip('.')}.{_of_a_term(verdict, code)} {way_out}."
            )
    check_own_modules(base, small_model(build, small))
    return f"a small model of its kind is right to {whole.error:.0e}; packed: {packed.outcome}"


def _of_a_term(verdict: Verdict, code: tuple[str, ...]) -> str:
    """The likely cause where a program's forward makes another loss, and the way out."""
    if not code or verdict.outcome != "wrong":
        return ""
    return (
        " If it adds a term to the loss: made of logits or hidden states it is one of a shard's tokens. Add it in the "
        "training loop, to outputs.loss (README, Limits, says how), or make it of parameters alone."
    )


def trial_core(model_class: type[PreTrainedModel]) -> str:
    """The attention of a trial: the GPU's cores do not run on CPU; what they are given is the same."""
    if model_class._supports_sdpa:
        return "sdpa"
    return TRIAL if model_class._supports_flash_attn or model_class._supports_flex_attn else "eager"


def _to_build(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that a model can be built of, and whose attention makes the truth."""
    config = copy.deepcopy(config)
    if config._attn_implementation == TRIAL:
        config._attn_implementation = "eager"
    return config


def compare(build: Build, config: PreTrainedConfig, groups: SequenceGroups, packed: bool = False) -> Verdict:
    """Train a model for a step, whole and split over the ranks of ``groups``. Collective over their gloo groups.

    Args:
        build: makes the model of the config.
        config: small, with the attention implementation that is asked about; of ``TRIAL`` the truth is eager's.
        groups: of the ranks of a sequence.
        packed: the sequence consists of several documents.
    """
    batch = _sample(config, packed)
    try:
        if (size := numel(build, config)) > _LARGEST:
            return Verdict("refused", f"its small model has {size:,} parameters, too many for a trial")
        truth = _whole_step(small_model(build, config), [batch])
    except Exception as error:
        return Verdict("refused", f"it cannot be trained on {LENGTH} tokens on CPU at all: {_words(error)}")
    mine: Any = None
    try:
        small = small_model(build, config)
        small.config._attn_implementation = config._attn_implementation
        mine = _split_step(small, batch, groups)
        failure = None
    except AlstError as error:
        failure = Verdict("refused", str(error))
    except Exception as error:
        failure = Verdict("crash", _words(error))
    failures = [each for each in gather_objects(failure, groups.sp_control_group) if each is not None]
    if failures:
        return next((each for each in failures if each.outcome == "crash"), failures[0])
    verdict = _judge(truth, mine, groups)
    if verdict.outcome == "wrong" and packed:
        # Some models let packed documents see one another, which is no yardstick: then each goes through it alone.
        parts = [{key: batch[key][:, slice(*place)] for key in ("input_ids", "labels")} for place in _places()]
        verdict = _judge(_whole_step(small_model(build, config), parts), mine, groups)
    if verdict.outcome == "wrong":
        again = _whole_step(small_model(build, config), [batch], seed=1)
        if any(not torch.equal(again[name], value) for name, value in truth.items()):
            return Verdict("refused", "its training draws random numbers, which ranks cannot draw alike")
    return verdict


def numel(build: Build, config: PreTrainedConfig) -> int:
    """Parameters of a model, without their memory where it can be built so."""
    try:
        with torch.device("meta"):
            model = build(_to_build(config))
    except Exception:  # it reads values when it is built
        model = build(_to_build(config))
    return sum(param.numel() for param in model.parameters())


def small_model(build: Build, config: PreTrainedConfig) -> torch.nn.Module:
    """A model with the same weights on every rank, with enough spread to make gradients lively."""
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(0)
        model = build(_to_build(config)).float()
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() > 1:
                    param.normal_(0.0, 1.0 / math.sqrt(param.shape[-1]))
    return model.train()


def _sample(config: PreTrainedConfig, packed: bool) -> dict[str, torch.Tensor]:
    """One sequence of random tokens, every seventh without a label."""
    make = torch.Generator().manual_seed(3)
    vocab = config.get_text_config().vocab_size
    ids = torch.randint(min(5, vocab - 1), vocab - 8, (1, LENGTH), generator=make)
    labels = ids.clone()
    labels[:, ::7] = IGNORED_LABEL
    batch = {"input_ids": ids, "labels": labels}
    if packed:
        batch["position_ids"] = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
        labels[batch["position_ids"] == 0] = IGNORED_LABEL  # as the packing collators do it
    return batch


def _places() -> Iterator[tuple[int, int]]:
    """Where the documents begin and end."""
    return itertools.pairwise(itertools.accumulate(DOCUMENTS, initial=0))


def _whole_step(model: torch.nn.Module, batches: list[dict[str, Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """``_step`` of a model that is not split, with the random numbers that its ranks would draw."""
    with PatchSet() as patches:
        count_draws(model, Draws(), patches)
        return _step(model, batches, seed)


def _step(model: torch.nn.Module, batches: list[dict[str, Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """The mean loss of the labelled tokens of some batches, and its gradients, by name."""
    counts = [int((each["labels"][:, 1:] != IGNORED_LABEL).sum()) for each in batches]
    total = torch.zeros(())
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for batch, count in zip(batches, counts, strict=True):
            if count or len(batches) == 1:  # a shard may have no label
                loss = model(**batch, use_cache=False).loss * (count / sum(counts) if len(batches) > 1 else 1.0)
                loss.backward()
                total += loss.detach()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return {"loss": total, **grads}


def _split_step(model: torch.nn.Module, batch: dict[str, Any], groups: SequenceGroups) -> dict[str, torch.Tensor]:
    check_model(model)
    P, calls = groups.sp_size, Calls()
    cut = shard_batch(batch, P, P, keeps_documents_apart(model), bool(router_classes(model)))
    with PatchSet() as patches:
        patch_model(model, groups.sp_control_group, patches, calls)
        guard_batches(model, groups, calls, patches)
        return _step(model, [{**cut.shards[groups.sp_rank], **cut.common}])


def _judge(truth: dict[str, torch.Tensor], mine: dict[str, torch.Tensor], groups: SequenceGroups) -> Verdict:
    worst, place = 0.0, "the loss"
    nothing = _NOTHING * math.sqrt(
        sum(float(grad.double().norm()) ** 2 for name, grad in truth.items() if name != "loss")
    )
    for name, whole in truth.items():
        found = mine.get(name, torch.zeros_like(whole)).double()
        if name != "loss":  # as DeepSpeed does it
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
