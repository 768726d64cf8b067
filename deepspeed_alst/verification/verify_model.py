"""The two verifications of a model: before its attention is patched, and live before the engine's first forward.

The first is the census's list, or a trial of a tiny model of its kind (hf_parity_trial.py); the second compares the
model as it is, unsharded and sharded (model_check.py), and leaves it bit for bit as it was.
"""

import contextlib
import itertools
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.distributed.collectives import any_rank, gather_objects, uncounted
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.random_draws.model_draws import zero_attention_dropout
from deepspeed_alst.verification.model_check import check_live_model
from deepspeed_alst.verification.program_code import GRADIENT_HOOK, check_gradient_hooks, class_name, program_code

_FAMILIES = """
afmoe apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bamba beam biogpt bitnet codegen cohere cohere2
cohere2_moe ctrl cwm deepseek_v2 deepseek_v3 diffllama emu3 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1
falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe
glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3
iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text
longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
mixtral mllama modernbert-decoder moshi nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon
phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next sarvam_mla
sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu zamba2
"""
VERIFIED_MODEL_TYPES = frozenset(_FAMILIES.split())
"""Model types whose loss and gradients under SP match SP 1 (``make census``); append-only."""
# DeepSpeed swaps the weights' storage under ZeRO-3; submodules are saved on their own.
_NOT_SAVED = ("_parameters", "_modules")


def verify_model(spec: ModelSpec, groups: SequenceGroups, upstream: bool = False) -> str:
    """Raise unless the census found the model's family right, or a tiny model of its kind is right here.

    Collective over the groups' gloo groups. In an ``upstream`` program, written for DeepSpeed's own ALST, the code that
    it has put into the model is not tried: this package replaces it.

    Returns:
        Summary of the trial; empty for a listed family.

    Raises:
        UnsupportedModelError: the model is not right; on all ranks.
    """
    # Of all ranks: a hook may be one rank's alone, and what follows is collective.
    everyone = gather_objects(program_code(spec.outer), groups.control_group)
    code = tuple(dict.fromkeys(itertools.chain(*everyone)))
    is_listed = (
        spec.config.model_type in VERIFIED_MODEL_TYPES or spec.is_multimodal
    )  # of which others are refused before
    if is_listed and not code:
        return ""
    check_gradient_hooks(spec.outer)
    from deepspeed_alst.verification import hf_parity_trial as trial

    # Modules that were put in are tried by themselves: a tiny model would not have them.
    put_in = {class_name(type(each)) for each in trial.custom_modules(spec.model).values()}
    code = () if upstream else tuple(each for each in code if each not in put_in and not each.startswith(GRADIENT_HOOK))
    if not is_listed:
        why = (
            f"{spec.name} (model_type='{spec.config.model_type}') is not in the {len(VERIFIED_MODEL_TYPES)} families "
            "verified under sequence parallelism (docs/census.md)"
        )
    elif code:
        why = f"{spec.name} runs the program's own code ({', '.join(code[:4])})"
    else:
        trial.check_custom_modules(spec.model, None)
        return ""
    return trial.check_tiny_model(spec, groups, why, code)


class ModelCheck:
    """Compare the live model before the engine's first forward in training mode, and before the first in evaluation.

    Args:
        engine: engine of a session; its model's code was verified.
        spec: its model.
    """

    def __init__(self, engine: Any, spec: ModelSpec) -> None:
        self._engine, self._spec, self._code = engine, spec, program_code(engine.module)
        self._checked = set[bool]()

    def run_once(self) -> None:
        """Check the model in its mode, unless that was done.

        Raises:
            UnsupportedModelError: the model is not right; on all ranks.
        """
        model, session = self._engine.module, self._engine.alst
        if model.training in self._checked:
            return
        changed = not self._checked and program_code(model) != self._code
        if any_rank(changed, session.groups.control_group):
            # In a thread of its own: an evaluation is without a graph, which the trial's backward needs.
            run_isolated(verify_model, self._spec, session.groups)
        began = time.perf_counter()
        with (
            untouched(model),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            session.calls.of_model_check(),
            uncounted(session.groups.sp_group),
            PatchSet() as patches,
        ):
            zero_attention_dropout(self._spec.outer, patches)
            patches.hook(self._spec.outer, "forward_pre", lambda *_: _forget_trace(self._engine), prepend=True)
            device = torch.device(self._engine.device)
            # Layers that only a long shard runs in chunks are checked both ways.
            for in_chunks in {not session.calls.chunks_from, True}:
                with session.calls.having(in_chunks=in_chunks):
                    summary = check_live_model(self._spec, session.groups, session.calls, device)
        _forget_trace(self._engine)
        self._checked.add(model.training)
        if dist.get_rank() == 0:
            mode, seconds = "training" if model.training else "evaluation", time.perf_counter() - began
            # Above the Trainer's progress bar, not inside of it.
            tqdm.write(f"deepspeed_alst: model check ({mode}): {summary} ({seconds:.1f} s)", file=sys.stderr)


def _forget_trace(engine: Any) -> None:
    """Invalidate ZeRO 3's parameter fetch trace: forwards of the check and of the first step differ in their order."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if hasattr(offload, "get_param_coordinator"):
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Restore buffers, attributes, hooks, training flags, configs and RNG states on exit; weights are not saved."""
    with ExitStack() as restore:
        saved: set[int] = set()
        for module in model.modules():
            _save(vars(module), saved, restore)
            for config in [each for each in vars(module).values() if hasattr(type(each), "to_diff_dict")]:
                _save(vars(config), saved, restore)
        restore.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            restore.callback(numpy.random.set_state, numpy.random.get_state())
        devices = {param.device.index for param in model.parameters() if param.device.type == "cuda"}
        restore.enter_context(torch.random.fork_rng([each for each in devices if each is not None]))
        yield


def _save(value: Any, saved: set[int], restore: ExitStack) -> None:
    """Restore a tensor, or a container and its contents, in place on exit."""
    if id(value) in saved:
        return
    saved.add(id(value))
    if type(value) is torch.Tensor and not value.is_meta:
        restore.callback(_restore_tensor, value, value.detach().clone())
    elif isinstance(value, dict | list | set):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if name not in _NOT_SAVED:
                _save(inner, saved, restore)
        # copy() keeps an OrderedDict and so the order of hooks.
        restore.callback(_restore_container, value, value.copy())


def _restore_container(container: Any, contents: Any) -> None:
    if isinstance(container, list):
        container[:] = contents
    elif (
        isinstance(container, set)
        or list(container) != list(contents)
        or any(container[key] is not value for key, value in contents.items())
    ):  # unchanged dicts stay: some take no update
        container.clear()
        container.update(contents)


def _restore_tensor(tensor: torch.Tensor, values: torch.Tensor) -> None:
    with torch.no_grad():
        if tensor.shape != values.shape:
            tensor.set_(values)
        elif not torch.equal(tensor, values):
            tensor.copy_(values)
