"""Verify a model before its attention is patched: by the list of the census, or by a trial of a tiny model."""

import torch

from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.verification.custom_modules import check_custom_modules, custom_modules
from deepspeed_alst.verification.gradient_hooks import check_gradient_hooks
from deepspeed_alst.verification.program_code import program_code
from deepspeed_alst.verification.verified_models import RIGHT


def verify_model(model: torch.nn.Module, groups: SequenceGroups, upstream: bool = False) -> str:
    """Raise unless the census found the model's family right, or a tiny model of its kind is right here.

    Collective over the groups' gloo groups. In an ``upstream`` program, written for DeepSpeed's own ALST, the code that
    it has put into the model is not tried: this package replaces it.

    Returns:
        Summary of the trial; empty for a listed family.

    Raises:
        UnsupportedModelError: the model is not right; on all ranks.
    """
    check_gradient_hooks(model)
    base, code = base_model(model), program_code(model)
    # foreign.py tries the modules that it has put in: a tiny model would not have them.
    put_in = {f"{cls.__module__}.{cls.__qualname__}" for cls in map(type, custom_modules(base).values())}
    code = () if upstream else tuple(each for each in code if each not in put_in)
    if base.config.model_type in RIGHT and not code:
        check_custom_modules(base, None)
        return ""
    from deepspeed_alst.verification.hf_parity_trial import check_tiny_model

    unlisted = (
        f"{type(base).__name__} (model_type='{base.config.model_type}') is none of the {len(RIGHT)} families that are "
        "verified under sequence parallelism (docs/census.md)"
    )
    if base.config.model_type in RIGHT:
        unlisted = f"{type(base).__name__} runs code of the program's own ({', '.join(code[:4])})"
    return check_tiny_model(model, groups, unlisted, code)
