"""PEFT's adapters: exact where each token is worked on by itself, refused by name where the sequence matters."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, KeepFp64, build_model, ds_config, full_weight, model_config, samples, trained
from benchmarks.families import family_config
from benchmarks.ranks import RankError
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import ShardingConfig, shard_batch
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.verification.hf_support_checks import check_model
from tests.models import family_batch
from tests.sabotage import twice_the_average

EXACT = 1e-12
_LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
_RANK4 = {**_LINEAR, "r": 4}

KINDS = {
    "LORA": ("LoraConfig", {**_RANK4, "task_type": "CAUSAL_LM"}),
    "LORA, no task": ("LoraConfig", _RANK4),
    "LORA, rslora, bias": ("LoraConfig", {**_RANK4, "use_rslora": True, "lora_bias": True}),
    "LORA, dora": ("LoraConfig", {**_RANK4, "use_dora": True}),
    "LORA, embedding and head": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "LORA, saved modules": ("LoraConfig", {**_RANK4, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "LORA, some tokens": ("LoraConfig", {**_RANK4, "trainable_token_indices": [3, 5, 7]}),
    "IA3": ("IA3Config", {**_LINEAR, "feedforward_modules": ["down_proj"]}),
    "LOHA": ("LoHaConfig", _RANK4),
    "LOKR": ("LoKrConfig", _RANK4),
    "VERA": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "OFT": ("OFTConfig", {**_LINEAR, "oft_block_size": 4}),
    "HRA": ("HRAConfig", _RANK4),
    "HIRA": ("HiraConfig", _RANK4),
    "MISS": ("MissConfig", _RANK4),
    "RANDLORA": ("RandLoraConfig", _RANK4),
    "ROAD": ("RoadConfig", {**_LINEAR, "group_size": 4}),
    "C3A": ("C3AConfig", {**_LINEAR, "block_size": 8}),
    "SHIRA": ("ShiraConfig", _RANK4),
    "VBLORA": ("VBLoRAConfig", {"target_modules": ["q_proj", "v_proj"], "vector_length": 4, "num_vectors": 8}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "ADAPTION_PROMPT": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"}),
    "BOFT": ("BOFTConfig", {**_LINEAR, "boft_block_size": 4}),
    "DELORA": ("DeloraConfig", _RANK4),
    "GRALORA": ("GraloraConfig", {**_RANK4, "gralora_k": 2}),
    "WAVEFT": ("WaveFTConfig", {**_LINEAR, "n_frequency": 16}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"token_indices": [3, 5, 7]}),
}


def adapted(kind: str, arguments: dict[str, Any], model: Any = None) -> Any:
    import peft

    torch.manual_seed(1)
    model = build_model(family_config("llama")) if model is None else model
    with mock.patch.dict(os.environ):  # BOFT leaves CXX behind, and with another compiler DeepSpeed builds its op anew
        return peft.get_peft_model(model, getattr(peft, kind)(**arguments))


def stir(model: Any) -> None:
    """Adapters start at zero, and gradients that pass them with it."""
    make = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in trained(model).values():
            param += 0.3 * torch.randn(param.shape, generator=make).to(param.dtype)


def adapter_step(kind: str, arguments: dict[str, Any], split: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step in fp64, whole or split over all ranks."""
    model = adapted(kind, arguments).double()
    stir(model)
    batch = family_batch(37, 2)
    with PatchSet() as undo, KeepFp64():
        if split:
            batch = shard_batch(batch, 2, ShardingConfig(2)).shards[dist.get_rank()]
            patch_model(ModelSpec(model), dist.group.WORLD, undo)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    grads = {name: param.grad for name, param in trained(model).items()}
    for grad in grads.values():
        if split:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return loss.item(), grads


def split_and_whole(kind: str, arguments: dict[str, Any]) -> tuple[float, float]:
    (whole_loss, whole), (loss, grads) = (adapter_step(kind, arguments, split) for split in (False, True))
    return abs(loss - whole_loss) / whole_loss, max(float((grads[n] - g).norm() / g.norm()) for n, g in whole.items())


@pytest.mark.parametrize("case", KINDS)
def test_an_adapter_that_works_token_by_token_is_exact(case, ranks2):
    check_model(ModelSpec(adapted(*KINDS[case])))
    loss, grad = ranks2.run(split_and_whole, *KINDS[case])[0]
    assert loss < EXACT and grad < EXACT


_CAUSAL = {"task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "kind, arguments, sentence",
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 3, **_CAUSAL}, "peft_type='PROMPT_TUNING' puts virtual tokens"),
        ("PromptEncoderConfig", {"num_virtual_tokens": 3, **_CAUSAL}, "peft_type='P_TUNING' puts virtual tokens"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 3, **_CAUSAL}, "peft_type='PREFIX_TUNING' puts virtual tokens"),
        ("AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 9, **_CAUSAL}, "'ADALORA' reallocates"),
        (
            "LoraConfig",
            {**_RANK4, "alora_invocation_tokens": [3], **_CAUSAL},
            "alora_invocation_tokens searches",
        ),
    ],
)
def test_what_looks_at_the_sequence_is_refused_by_name(kind, arguments, sentence):
    with pytest.raises(UnsupportedModelError) as caught:
        check_model(ModelSpec(adapted(kind, arguments)))
    assert sentence in str(caught.value)


def test_an_adapter_without_a_wrapper_is_checked_too():
    from peft import LoraConfig, inject_adapter_in_model

    model = build_model(family_config("llama"))
    inject_adapter_in_model(LoraConfig(**_RANK4, task_type="CAUSAL_LM", alora_invocation_tokens=[3]), model)
    with pytest.raises(UnsupportedModelError, match="adapter 'default': alora_invocation_tokens searches"):
        check_model(ModelSpec(model))


def test_the_facts_are_the_base_models_and_a_merged_adapter_is_none():
    model = adapted("LoraConfig", _RANK4)
    merged = model.merge_and_unload()
    assert check_model(ModelSpec(merged)) == check_model(ModelSpec(build_model(family_config("llama"))))
    assert [kv for _, kv, _ in check_model(ModelSpec(adapted("LoraConfig", _RANK4)))] == [2]


def test_a_layer_with_a_config_of_its_own_is_refused():
    model = build_model(family_config("llama"))
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.self_attn has a config of its own"):
        check_model(ModelSpec(model))


# --- with DeepSpeed


def start(
    stage: int, sp_size: int, kind: str, arguments: dict[str, Any], stirred: bool = True, base: Any = None
) -> Any:
    import deepspeed

    model = adapted(kind, arguments, build_model(model_config(Cell())) if base is None else base)
    if stirred:
        stir(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(stage=stage), sp_size))[0]


def steps(engine: Any, number: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Mean loss of each optimizer step, and the last step's gradients."""
    from deepspeed.utils import safe_get_full_grad

    import deepspeed_alst

    losses = []
    for ranks in samples(Cell(), 97)[:number]:
        mean = torch.zeros(())
        micros = list(deepspeed_alst.shard_dataloader(ranks[dist.get_rank()], engine))
        for batch in micros:
            loss = engine(**batch).loss
            engine.backward(loss)
            mean += loss.detach() / len(micros)
            if engine.is_gradient_accumulation_boundary():
                grads = {name: safe_get_full_grad(param).clone() for name, param in trained(engine.module).items()}
            engine.step()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses, grads


def errors_under_zero(stage: int, kind: str, arguments: dict[str, Any]) -> tuple[float, float]:
    """Relative differences of SP 2 to SP 1 after two steps: of the loss, of the worst gradient."""
    results = []
    for sp_size in (1, 2):
        engine = start(stage, sp_size, kind, arguments)
        results.append(steps(engine, 2))
        engine.destroy()
    (whole_losses, whole), (losses, grads) = results
    assert all(math.isfinite(loss) for loss in losses) and grads.keys() == whole.keys()
    worst = max(float((grads[name] - true).norm() / true.norm()) for name, true in whole.items())
    return abs(losses[-1] - whole_losses[-1]) / whole_losses[-1], worst


@pytest.mark.parametrize(
    "stage, case",
    [
        (3, "LORA, dora"),
        (3, "LORA, embedding and head"),
        (3, "LORA, saved modules"),
        (3, "LORA, some tokens"),
        (3, "IA3"),
        (1, "VERA"),
        (2, "LORA, no task"),
    ],
)
def test_adapters_train_as_without_sequence_parallelism(stage, case, ranks2):
    loss, grad = ranks2.run(errors_under_zero, stage, *KINDS[case])[0]
    assert loss < 1e-6 and grad < 2e-5


def two_adapters(sp_size: int) -> Any:
    import deepspeed
    from peft import LoraConfig

    model = adapted("LoraConfig", _RANK4, build_model(model_config(Cell())))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("second")
    stir(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(stage=2), sp_size))[0]
    result = steps(engine)
    engine.destroy()
    return result


def test_the_active_adapter_trains(ranks2):
    (whole_losses, whole), (losses, grads) = (ranks2.run(two_adapters, sp_size)[0] for sp_size in (1, 2))
    assert losses == pytest.approx(whole_losses, rel=1e-6)
    assert len(grads) == 4 and all(".second." in name for name in grads)
    assert all((grads[name] - true).norm() < 1e-5 * true.norm() for name, true in whole.items())


def first_step_of_a_fresh_adapter(sabotage: bool) -> tuple[bool, list[str]]:
    """Half of the gradients are zero, among them those of the smallest and of the largest parameter."""
    engine = start(2, 2, "LoraConfig", {"r": 4, "target_modules": ["up_proj", "down_proj"]}, stirred=False)
    try:
        with twice_the_average(sabotage):
            _, grads = steps(engine)
        zeros = [name for name, grad in grads.items() if not grad.any()]
        return not engine.alst_features.gradient_check._watched, zeros
    finally:
        engine.destroy()


def test_the_probe_finds_something_to_compare_in_a_fresh_adapter(ranks2):
    for compared, zero in ranks2.run(first_step_of_a_fresh_adapter, False):
        assert compared and len(zero) == 4 and all("lora_A" in name for name in zero)
    with pytest.raises(RankError) as caught:
        ranks2.run(first_step_of_a_fresh_adapter, True)
    assert all("came out as 2 times the average" in str(error) for error in caught.value.errors)


def whole_batch_to_a_wrapped_model() -> None:
    engine = start(2, 2, "LoraConfig", _RANK4)
    try:
        engine(**samples(Cell(), 97)[0][dist.get_rank()][0])
    finally:
        engine.destroy()


def test_the_batch_guard_sees_the_calls_of_a_wrapped_model(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(whole_batch_to_a_wrapped_model)
    assert all("it has no position_ids, so it is not split" in str(error) for error in caught.value.errors)


def train_sharded_and_save(folder: str) -> tuple[float, torch.Tensor]:
    """A model loaded sharded, a fresh adapter on it, two steps, saved as PEFT's users do under ZeRO 3.

    Returns the worst relative difference of the gradients to those of a model loaded whole, and the logits of a plain
    model with the adapter's weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    arguments = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    sharding = HfDeepSpeedConfig(ds_config(Cell(stage=3), 2))
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    assert all(hasattr(param, "ds_id") for param in base.parameters())
    del sharding
    engine = start(3, 2, "LoraConfig", arguments, base=base)
    _, grads = steps(engine, 2)
    weights = {name: full_weight(param).float() for name, param in trained(engine.module).items()}
    state = engine._zero3_consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        engine.module.save_pretrained(f"{folder}/adapter", state_dict=state)
    engine.destroy()

    plain = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    engine = start(3, 2, "LoraConfig", arguments, base=plain)
    _, whole = steps(engine, 2)
    engine.destroy()
    fresh = adapted("LoraConfig", arguments, AutoModelForCausalLM.from_pretrained(f"{folder}/base"))
    fresh.load_state_dict(weights, strict=False)
    with torch.no_grad():
        logits = fresh(input_ids=torch.arange(20)[None]).logits
    return max(float((grads[n] - true).norm() / true.norm()) for n, true in whole.items()), logits


_RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/adapter")
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(20)[None]).logits, folder + "/logits.pt")
assert "deepspeed_alst" not in sys.modules
"""


@pytest.mark.slow
def test_an_adapter_on_a_sharded_model_is_saved_and_loads_without_the_package(tmp_path, ranks2):
    build_model(model_config(Cell())).save_pretrained(tmp_path / "base")
    worst, logits = ranks2.run(train_sharded_and_save, str(tmp_path))[0]
    assert worst < 1e-5
    environment = {**os.environ, "DEEPSPEED_ALST_AUTOLOAD": "0", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _RELOAD, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)
