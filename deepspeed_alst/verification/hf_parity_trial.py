"""Try a model family numerically: one training step of a tiny model, unsharded and sharded, on CPU.

Every rank builds the same tiny model and the same random sequence, computes the loss and all gradients of the whole
sequence alone, then those of its shard with the other ranks. The census tries every family of transformers this way,
the start of a training run a model that the census has not found right, with the program's own code.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from deepspeed_alst.attention.hf_attention import find_backend
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet, copy_function
from deepspeed_alst.core.selfcheck import is_equivalent, random_tensors, run_isolated, tolerance
from deepspeed_alst.data.sharding import ShardingConfig, shard_batch
from deepspeed_alst.distributed.collectives import gather_objects
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import AlstError, UnsupportedModelError
from deepspeed_alst.random_draws.model_draws import count_draws, without_dropout
from deepspeed_alst.sequence_parallel.batch_check import check_batches
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.verification.hf_support_checks import check_model
from deepspeed_alst.verification.hf_tiny_models import Build, numel, shrink, small_model, trial_core
from deepspeed_alst.verification.program_code import class_name, code_of_modules, is_user_defined

# Share of all gradients' norm; less is rounding, e.g. for a key bias, which softmax cancels.
_GRAD_NORM_FLOOR = 1e-4
_MAX_TRIAL_PARAMETERS = 2**25  # parameters; each rank holds several fp32 copies
_TOKENS = 7
_TERM = (
    " A loss term that its forward computes from logits or hidden states covers only this rank's tokens. Add it in the "
    "training loop, to outputs.loss (docs/limitations.md), or compute it from parameters alone."
)
LENGTH = 101
"""Tokens of the sequence: more than any window of a tiny config, and a prime."""
DOCUMENTS = (37, 1, 30, 33)
"""Lengths of the packed documents: they end inside shards, and one is a single token."""

_Weighted = tuple[dict[str, Any], float]
"""Batch, and the factor of its loss."""
Patch = Callable[[ModelSpec, ForwardContext, PatchSet], None]


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
            f"{unlisted}, and no tiny copy for a trial can be built from its config: {_describe(error)}. {way_out}."
        ) from error

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        return _install_program_code(spec, type(base)(config))

    whole = compare(build, small, groups)
    packed = compare(build, small, groups, packed=True) if whole.outcome == "right" else whole
    for verdict, batch in ((whole, "sequence"), (packed, "packed sequence")):
        # A packed batch refused here raises no error yet: training refuses it too.
        if verdict.outcome in ("wrong", "crash") or (verdict.outcome == "refused" and verdict is whole):
            hint = _TERM if code and verdict.outcome == "wrong" else ""
            raise UnsupportedModelError(
                f"{unlisted}, and the trial of a tiny model on a {batch} failed ({verdict.outcome}): "
                f"{verdict.why.rstrip('.')}.{hint} {way_out}."
            )
    check_custom_modules(base, small_model(build, small))
    return f"a tiny model is right to {whole.error:.0e}; packed: {packed.outcome}"


def compare(
    build: Build, config: PreTrainedConfig, groups: SequenceGroups, packed: bool = False, patch: Patch | None = None
) -> Verdict:
    """Compare one training step unsharded and sharded over ``groups``. Collective over their gloo groups.

    Args:
        build: builds the model from a config.
        config: tiny config, with the attention implementation under test.
        groups: process groups of the sequence.
        packed: if True the sequence consists of several documents.
        patch: patches the sharded model further.
    """
    batch = _sample(config, packed)
    try:
        if (size := numel(build, config)) > _MAX_TRIAL_PARAMETERS:
            return Verdict("refused", f"the tiny model has {size:,} parameters, more than {_MAX_TRIAL_PARAMETERS:,}")
        truth = _whole_step(small_model(build, config), [(batch, 1.0)])
    except Exception as error:
        return Verdict("refused", f"a step on {LENGTH} tokens on CPU raises {_describe(error)}")
    mine: Any = None
    failure = None
    try:
        small = small_model(build, config)
        small.config._attn_implementation = config._attn_implementation
        mine = _split_step(small, batch, groups, patch)
    except Exception as error:
        refused = isinstance(error, AlstError)
        failure = Verdict("refused", str(error)) if refused else Verdict("crash", _describe(error))
    failures = [each for each in gather_objects(failure, groups.sp_control_group) if each is not None]
    if failures:
        return next((each for each in failures if each.outcome == "crash"), failures[0])
    verdict = _compare(truth, mine, groups)
    if verdict.outcome == "wrong" and packed:
        # A model may attend across packed documents, which is no reference; then each document runs alone.
        verdict = _compare(_whole_step(small_model(build, config), _documents(batch)), mine, groups)
    if verdict.outcome == "wrong":
        again = _whole_step(small_model(build, config), [(batch, 1.0)], seed=1)
        if any(not torch.equal(again[name], value) for name, value in truth.items()):
            return Verdict("refused", "its training draws random numbers that depend on the number of ranks")
    return verdict


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


def _documents(batch: dict[str, torch.Tensor]) -> list[_Weighted]:
    """Return each packed document with labels, and its share of all labels."""
    places = itertools.pairwise(itertools.accumulate(DOCUMENTS, initial=0))
    parts = [{key: batch[key][:, slice(*place)] for key in ("input_ids", "labels")} for place in places]
    counts = [int((each["labels"][:, 1:] != IGNORED_LABEL).sum()) for each in parts]
    return [(part, count / sum(counts)) for part, count in zip(parts, counts, strict=True) if count]


def _whole_step(model: torch.nn.Module, batches: list[_Weighted], seed: int = 0) -> dict[str, torch.Tensor]:
    """Run ``_step`` on an unsharded model, with the random numbers that its ranks would draw."""
    with PatchSet() as patches:
        count_draws(ModelSpec(model), ForwardContext(), patches)
        return _step(model, batches, seed)


def _step(model: torch.nn.Module, batches: list[_Weighted], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the sum of the batches' losses times their factors, and its gradients by name."""
    total = torch.zeros(())
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: a GPU's is the program's
        for batch, factor in batches:
            loss = model(**batch, use_cache=False).loss * factor
            loss.backward()
            total += loss.detach()
    return {"loss": total} | {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def _split_step(
    model: torch.nn.Module, batch: dict[str, Any], groups: SequenceGroups, patch: Patch | None
) -> dict[str, torch.Tensor]:
    spec = ModelSpec(model)
    check_model(spec)
    P, calls = groups.sp_size, ForwardContext()
    packing = find_backend(spec.config._attn_implementation) is not None
    cut = shard_batch(batch, P, ShardingConfig(P, packing, marks_padding=bool(spec.router_classes)))
    with PatchSet() as patches:
        patch_model(spec, groups.sp_control_group, patches, calls)
        check_batches(spec, groups, calls, patches)
        if patch is not None:
            patch(spec, calls, patches)
        return _step(model, [({**cut.shards[groups.sp_rank], **cut.common}, 1.0)])


def _compare(truth: dict[str, torch.Tensor], mine: dict[str, torch.Tensor], groups: SequenceGroups) -> Verdict:
    worst, place = 0.0, "the loss"
    nothing = _GRAD_NORM_FLOOR * math.sqrt(
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
    # The two steps differ by 1e-7 to 1e-5; a wrong one is off by 1% or more.
    if worst <= tolerance(torch.float32):
        return Verdict("right", error=worst)
    return Verdict("wrong", f"{place} is off by {worst:.1e}", worst)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


# --- the program's own code


def _install_program_code(spec: ModelSpec, small: PreTrainedModel) -> PreTrainedModel:
    """Install the program code of single modules on a tiny model of the same kind; return the tiny model.

    Objects of the live model that the code reaches, by a closure or a bound method, become those of the tiny model.
    """
    model, base, tiny = spec.outer, spec.model, ModelSpec(small)
    counterparts: dict[int, Any] = {id(module): tiny.counterpart(name) for name, module in base.named_modules()}
    counterparts[id(model)] = small
    of_wrapper = [each for each in code_of_modules(model) if each[0] == ""] if base is not model else []
    for name, kind, code, hook_options in [*code_of_modules(base), *of_wrapper]:
        other = tiny.counterpart(name)
        if other is None:
            raise LookupError(f"{kind} of {name}: the tiny model has no such module")
        code = copy_function(code, replace=lambda value: counterparts.get(id(value)) or value)
        if hook_options is None:
            PatchSet().set(other, kind, code)
        else:
            PatchSet().hook(other, kind, code, **hook_options)
    return small


def custom_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the outermost modules of user-defined classes, by name; the model itself is excluded."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if name and is_user_defined(type(module)) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def check_custom_modules(model: torch.nn.Module, built: torch.nn.Module | None) -> None:
    """Raise UnsupportedModelError if a user-defined module that no tiny model has ``built`` is not token-wise."""
    tried = {type(module) for module in built.modules()} if built is not None else set()
    for name, module in custom_modules(model).items():
        if type(module) not in tried and (problem := run_isolated(_problem, module)):
            raise UnsupportedModelError(
                f"{name} is a {class_name(type(module))}, which {problem}: under sequence parallelism it would get a "
                "part of the sequence. Build it in the model's class, which a trial of a tiny model covers, or set "
                "sequence_parallel_size to 1."
            )


def _problem(module: torch.nn.Module) -> str:
    """Return why a module is not known to be token-wise, ``[1, S, H] -> [1, S, H']``; empty if it is."""
    training = module.training
    with torch.random.fork_rng([]), deepspeed.zero.GatheredParameters(list(module.parameters())):
        weight = next((param for param in module.parameters() if param.dim()), torch.zeros(_TOKENS))
        # A norm's weight has its input's width; without weights any width works.
        linears = (each.in_features for each in module.modules() if isinstance(each, torch.nn.Linear))

        def run(x: torch.Tensor) -> torch.Tensor:
            output = module(x)
            return output[0] if isinstance(output, tuple) else output

        def in_parts(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([run(x[:, :3]), run(x[:, 3:])], dim=1)

        module.eval()
        try:
            # Tokens before and after a part must not change its result.
            x_SH = random_tensors()(1, _TOKENS, next(linears, weight.shape[-1])).to(weight.device, weight.dtype)
            return "" if is_equivalent(run, in_parts, (x_SH.requires_grad_(),)) else "mixes tokens"
        except Exception as error:
            return f"raises in a forward of its own ({_describe(error)})"
        finally:
            module.train(training)
