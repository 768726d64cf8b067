"""Liger's kernels in our tiles and in a model, run by Triton's interpreter on CPU; nothing here ran on a GPU.

The interpreter has no bf16 arithmetic, which Liger's activations use: parts of a model run in fp32, the loss in all.
"""

import copy
import os
import re
import sys
import tempfile
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cells import Cell, build_model
from benchmarks.families import family_config
from benchmarks.kernels.cross_entropy import tile_peak
from benchmarks.kernels.judge import Interpreted, measure
from benchmarks.ranks import RankError
from benchmarks.ranks import interpreted_ranks as started_interpreted
from deepspeed_alst.config.schema import TiledLossConfig, TiledMLPConfig, parse
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import DataError, SetupError, UnsupportedModelError
from deepspeed_alst.liger.hf_liger import apply_liger, use_liger
from deepspeed_alst.tiling.loss import LogitTransform, tiled_loss
from deepspeed_alst.tiling.tiled_loss import patch_unsharded_loss, tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from tests.models import family_batch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FULL = {"layer_types": ["full_attention"] * 2}


@pytest.fixture(scope="module")
def interpreted():
    process = Interpreted()
    yield process
    process.close()


@pytest.fixture(scope="module")
def interpreted_ranks():
    with started_interpreted(2) as ranks:
        yield ranks


def too_far(got: torch.Tensor, same: torch.Tensor, truth: torch.Tensor) -> dict:
    """The metrics in which a result is further from fp64 than the yardstick allows."""
    return {name: pair for name, pair in measure(got, same, truth).items() if pair[0] > pair[1]}


def liger_keys(value: Any, **others: Any) -> Any:
    return parse({"alst": {"liger_kernel": value, **others}})


# --- its loss, against fp64 by the error of torch in the same dtype


def _kernel_errors(dtype: torch.dtype) -> dict:
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_reference, liger_cross_entropy_
    from tests.liger_interpreter import faithful_liger

    torch.manual_seed(0)
    wrong = {}
    for t, V, gap in ((20, 3, 0), (17, 63, 5), (5, 1000, 0), (2, 40001, 7)):
        for smoothing, softcap in ((0.0, 0.0), (0.1, 0.0), (0.1, 2.0)):
            storage = torch.full((t, V + gap), torch.nan, dtype=dtype)
            logits_tV, labels_t = storage[:, :V], torch.randint(0, V, (t,))
            logits_tV.copy_(3 * torch.randn(t, V))
            labels_t[2::5] = -100
            truth_tV, same_tV, scale = logits_tV.double(), logits_tV.clone(), torch.tensor(0.37)
            truth = cross_entropy_reference(truth_tV, labels_t, scale, smoothing, softcap)
            same = cross_entropy_reference(same_tV, labels_t, scale, smoothing, softcap)
            with faithful_liger():
                loss = liger_cross_entropy_(logits_tV, labels_t, 1 / 0.37, smoothing, softcap)
            assert loss.dtype == torch.float32, "rounded losses"
            found = too_far(loss, same, truth) | too_far(logits_tV, same_tV, truth_tV)
            if found or not storage[:, V:].isnan().all():
                wrong[(V, smoothing, softcap)] = found or "it wrote between the rows"
    return wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradient_are_as_good_as_torchs(interpreted, dtype):
    assert interpreted.run(_kernel_errors, dtype) == {}


def _edges() -> None:
    from deepspeed_alst.kernels.cross_entropy import liger_cross_entropy_
    from tests.liger_interpreter import faithful_liger

    with faithful_liger() as traffic:
        assert liger_cross_entropy_(torch.randn(0, 5), torch.zeros(0, dtype=torch.long), 3.0) == 0
        assert traffic.read == traffic.written == 0
        logits_tV = torch.randn(2, 9)
        before = logits_tV.clone()
        liger_cross_entropy_(logits_tV, torch.tensor([1, 2]), 1.0, gradient=False)
        assert torch.equal(logits_tV, before) and traffic.written == 2 * 4
    torch.library.opcheck(
        torch.ops.deepspeed_alst.liger_cross_entropy_.default,
        (torch.randn(3, 40), torch.tensor([1, -100, 3]), 2.0, 0.1, 0.0, True),
    )


def test_empty_tiles_evaluation_and_tensors_that_do_not_fit(interpreted):
    interpreted.run(_edges)


def _tiled_errors(dtype: torch.dtype, softcap: float) -> dict:
    """Of a head with a bias, in tiles, with a factor from behind; and of an evaluation."""
    from tests.liger_interpreter import faithful_liger

    torch.manual_seed(0)
    weight, bias, hidden = (3 * torch.randn(50, 16)).to(dtype), torch.randn(50).to(dtype), torch.randn(60, 16).to(dtype)
    labels, scale = torch.randint(0, 50, (60,)), torch.tensor(1 / 45, dtype=torch.float64)
    labels[::4] = -100

    def cap(x: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(x / softcap) if softcap else x

    results = []
    liger = LogitTransform(1.0, softcap, use_liger=True)
    for of_dtype, kernel in ((torch.float64, None), (dtype, None), (dtype, liger)):
        leaves = [each.to(of_dtype).clone().requires_grad_() for each in (weight, bias, hidden)]

        def logits(x, leaves=leaves, kernel=kernel):
            found = F.linear(x, leaves[0], leaves[1])
            return found if kernel else cap(found.float() if found.dtype.itemsize == 2 else found)

        arguments = (logits, leaves[:2], leaves[2], labels, scale, 7, 0.1, kernel)
        with faithful_liger() as traffic:
            loss = tiled_loss(*arguments)
            (3 * loss).backward()
            trained = traffic.written
            with torch.no_grad():
                evaluated = tiled_loss(*arguments)
        assert (trained > 0) == (kernel is not None)
        # An evaluation makes losses, and no gradient.
        assert traffic.written - trained == (45 * 4 if kernel else 0)
        results.append([loss.detach(), evaluated, *(each.grad for each in leaves)])
    truth, same, got = results
    named = zip(("loss", "evaluated", "weight", "bias", "hidden"), got, same, truth, strict=True)
    return {name: found for name, *each in named if (found := too_far(*each))}


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_with_a_bias_smoothing_and_a_cap_in_tiles(interpreted, dtype, softcap):
    assert interpreted.run(_tiled_errors, dtype, softcap) == {}


def _refused_in_a_loss(label: int) -> None:
    weight, hidden = torch.nn.Parameter(torch.randn(50, 8)), torch.randn(20, 8)
    labels = torch.arange(20)
    labels[7], labels[9] = label, -100
    transform = LogitTransform(use_liger=True)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            tiled_loss(lambda x: x @ weight.t(), [weight], hidden, labels, torch.tensor(1.0), 4, 0.0, transform)


@pytest.mark.parametrize("label", [50, -1, 2**40])
def test_a_label_that_is_no_token_is_an_error_before_the_kernel_reads_it(interpreted, label):
    with pytest.raises(DataError, match=rf"label {label} is outside the vocabulary of 50 tokens"):
        interpreted.run(_refused_in_a_loss, label)


def _model(model_type: str, **changed: Any) -> torch.nn.Module:
    config = family_config(model_type, **(FULL if model_type in ("gemma2", "qwen3") else {}), **changed)
    config._experts_implementation = "eager"  # the grouped matrix product has no fp64
    return build_model(config, core="eager" if model_type == "gemma2" else "sdpa").train()


def _adapted(model_type: str, **changed: Any) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(_model(model_type, **changed), config)


def _step_with(model: torch.nn.Module, backend: str | None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Loss and gradients of two micro-steps, and an evaluation's loss, whose logits somebody looks at."""
    batch = family_batch(24, 2)
    with PatchSet() as undo:
        if backend is not None:
            tile_loss(
                ModelSpec(model),
                TiledLossConfig(backend=backend, tile_tokens=13),
                ForwardContext(),
                lambda module: None,
                undo,
            )
            patch_unsharded_loss(ModelSpec(model), undo)
        for _ in range(2):
            loss = model(**batch, use_cache=False).loss
            (loss * 0.37).backward()
        with torch.no_grad():
            output = model.eval()(**batch, use_cache=False)
        assert tuple(output.logits.shape) == (2, 24, 97) and torch.isfinite(output.logits + 0).all()
    return loss.detach(), output.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _errors_in_a_model(make: Any, model_type: str, dtype: torch.dtype, changed: dict) -> dict[str, float]:
    """Relative errors of losses and of the worst gradient against fp64: torch's and Liger's."""
    from tests.liger_interpreter import faithful_liger

    model, results = make(model_type, **changed), {}
    for name, of_dtype in (("truth", torch.float64), ("torch", dtype), ("liger", dtype)):
        with faithful_liger() as traffic:
            results[name] = _step_with(copy.deepcopy(model).to(of_dtype), None if name == "truth" else name)
            assert (traffic.written > 0) == (name == "liger"), "the kernel did not run, or ran where it should not"
    truth, errors = results["truth"], {}
    for name in ("torch", "liger"):
        loss, evaluated, grads = results[name]
        assert grads.keys() == truth[2].keys()
        errors[name] = max(((grads[n] - true).norm() / true.norm()).item() for n, true in truth[2].items())
        errors[f"{name} loss"] = max(abs(loss / truth[0] - 1).item(), abs(evaluated / truth[1] - 1).item())
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "model_type", "changed"),
    [
        (_model, "llama", {"tie_word_embeddings": True}),
        (_model, "gemma2", {"final_logit_softcapping": 3.0}),
        (_model, "granite", {"logits_scaling": 7.0}),
        (_adapted, "llama", {}),
    ],
)
def test_a_model_trains_and_is_evaluated_as_with_torchs_tiles(interpreted, make, model_type, changed, dtype):
    errors = interpreted.run(_errors_in_a_model, make, model_type, dtype, changed)
    eps = torch.finfo(dtype).eps
    assert errors["liger"] <= 1.5 * errors["torch"] + eps / 2, errors
    assert errors["liger loss"] <= 3 * errors["torch loss"] + torch.finfo(torch.float32).eps, errors


def test_the_ledger_sees_a_kernel_that_keeps_one_value_a_logit(interpreted):
    by_liger, by_torch = (interpreted.run(tile_peak, backend, 523) for backend in ("liger", "torch"))
    # An fp32 copy and a bf16 gradient fewer.
    assert by_torch - by_liger > 1.4 * 523 * 128256 * 4


# --- its parts in a model


def _patched_errors(model_type: str, parts: Any, checkpointing: bool, tiled: bool) -> tuple[float, float, dict, int]:
    """The worst gradient's error against fp64 of two micro-steps: torch's, Liger's; and what of Liger's ran."""
    from liger_kernel.ops import geglu, swiglu

    from tests.liger_interpreter import faithful_liger

    model, batch = _model(model_type), family_batch(9, 1)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:  # norm weights that are not all the same
                param.add_(0.2 * torch.randn_like(param))

    def grads_of(each: torch.nn.Module) -> dict[str, torch.Tensor]:
        if checkpointing:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            (each(**batch, use_cache=False).loss * 0.37).backward()
        return {name: param.grad for name, param in each.named_parameters()}

    def error(grads: dict[str, torch.Tensor]) -> float:
        return max(((grads[name] - true).norm() / true.norm()).item() for name, true in truth.items())

    truth, same = grads_of(copy.deepcopy(model).double()), grads_of(copy.deepcopy(model))
    gates = 0

    def counting(launch: Any) -> Any:
        def counted(*args: Any) -> Any:
            nonlocal gates
            gates += 1
            return launch(*args)

        return counted

    with PatchSet() as undo, faithful_liger() as traffic:
        for module, name in ((swiglu, "swiglu_forward"), (geglu, "geglu_forward")):
            undo.enter_context(mock.patch.object(module, name, counting(getattr(module, name))))
        words = apply_liger(ModelSpec(model), liger_keys(parts), "cpu", undo).summary
        if tiled:
            tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=4), lambda module: None, undo)
        found = error(grads_of(model))
        assert traffic.written > 0
    return error(same), found, words, gates


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("llama", "rms_norm (5), rope (2), swiglu (2) in LlamaForCausalLM"),
        ("gemma2", "geglu (2), rms_norm (9), rope (2) in Gemma2ForCausalLM"),
        pytest.param("qwen3", "rms_norm (9), rope (2), swiglu (2) in Qwen3ForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_tiles_call_ligers_activation_and_gradients_are_as_good_as_torchs(interpreted, model_type, words):
    torch_error, error, found, gates = interpreted.run(_patched_errors, model_type, True, True, True)
    assert found == words
    assert error <= 1.5 * torch_error + torch.finfo(torch.float32).eps, (error, torch_error)
    # Of each of two layers: twice to see that it is token-wise, then in two micro-steps three tiles a pass. The
    # norm behind Gemma 2's MLP needs its value in the recomputation.
    assert gates == 2 * (2 + 2 * 3 * (3 if model_type == "gemma2" else 2))


def test_whole_mlps_too(interpreted):
    torch_error, error, _, gates = interpreted.run(_patched_errors, "llama", True, False, False)
    assert error <= 1.5 * torch_error + torch.finfo(torch.float32).eps and gates == 2 * 2


@pytest.mark.slow
def test_experts_too(interpreted):
    torch_error, error, words, _ = interpreted.run(_patched_errors, "mixtral", {"swiglu": True}, False, True)
    assert "swiglu (2)" in words
    assert error <= 1.5 * torch_error + torch.finfo(torch.float32).eps


def _state_of(model: torch.nn.Module) -> list:
    """All that a patch could leave behind: in the model, in transformers and in torch."""
    from transformers.activations import ACT2FN

    namespaces = [space for module in model.modules() for space in (vars(module), module._modules)]
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            namespaces += [vars(module), *(vars(each) for each in vars(module).values() if isinstance(each, type))]
    namespaces += [vars(torch.nn), vars(F), ACT2FN]
    return [(space, _stored(space)) for space in namespaces]


def _stored(space: Any) -> dict:
    """What is in a namespace, also where a class of dicts makes another value of it."""
    return dict(dict.items(space)) if isinstance(space, dict) else dict(space)


def _left_behind(before: list) -> list[str]:
    pairs = [(names, _stored(space)) for space, names in before]
    return [name for names, now in pairs for name in {**names, **now} if names.get(name) is not now.get(name)]


SMALL_FAMILIES = {
    "ministral": {"head_dim": 8, "sliding_window": None},
    "nemotron": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
}


def _on_meta(model_type: str) -> torch.nn.Module | None:
    """A model of two layers without memory; None where transformers' config for it makes none."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    def shorten(config: Any) -> None:
        for name in ("num_hidden_layers", "num_layers", "depth"):
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, 2)
        for name in ("layer_types", "mlp_layer_types"):
            if getattr(config, name, None) and model_type != "falcon_h1":
                setattr(config, name, getattr(config, name)[:2])
        for inner in list(vars(config).values()):
            if hasattr(inner, "to_diff_dict"):
                shorten(inner)

    config = CONFIG_MAPPING[model_type](**SMALL_FAMILIES.get(model_type, {}))
    shorten(config)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(config)
    return None


def _all_families() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Of each family that Liger knows: what was said, and what was left behind."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    said, left = {}, {}
    for model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        model = _on_meta(model_type)
        if model is None:
            continue
        # What a function of Liger's imports is there before, to be compared.
        with PatchSet() as undo:
            apply_liger(ModelSpec(model), liger_keys({}), "cuda", undo)
        before = _state_of(model)
        with PatchSet() as undo:
            said[model_type] = apply_liger(ModelSpec(model), liger_keys({}), "cuda", undo).summary
        left[model_type] = _left_behind(before)
    return said, left


def _as_on_a_gpu(function: Any, *args: Any) -> Any:
    """No kernel runs: that the interpreter is there is not to be seen."""
    import liger_kernel.transformers.monkey_patch  # noqa: F401  Triton looks at the environment when it is loaded

    with mock.patch.dict(os.environ):
        del os.environ["TRITON_INTERPRET"]
        return function(*args)


def test_every_family_that_liger_knows(interpreted):
    said, left = interpreted.run(_as_on_a_gpu, _all_families)
    assert len(said) > 40 and not any(left.values()), left
    # For four of them Liger 0.8.5 imports names that transformers 5.24 does not have any more.
    works = {name: words for name, words in said.items() if "raised ImportError" not in words}
    assert len(works) >= len(said) - 4 and not any(words.startswith("not used") for words in works.values()), said
    assert works["llama"] == "rms_norm (5), rope (2), swiglu (2) in LlamaForCausalLM"
    assert works["nemotron"] == "relu_squared (2) in NemotronForCausalLM"
    assert works["deepseek_v3"] == "rms_norm (9), swiglu (2) in DeepseekV3ForCausalLM"
    assert works["gemma3"].startswith("geglu (2), layer_norm (5), rms_norm (14), rope (2) in")


def _words_of(model: Any, parts: Any, **others: Any) -> str:
    with PatchSet() as undo:
        spec = ModelSpec(_model(model) if isinstance(model, str) else model)
        return apply_liger(spec, liger_keys(parts, **others), "cuda", undo).summary


@pytest.mark.parametrize(
    ("model_type", "parts", "words"),
    [
        ("llama", {"rope": False}, "rms_norm (5), swiglu (2) in LlamaForCausalLM"),
        ("llama", {"rms_norm": False, "swiglu": False}, "rope (2) in LlamaForCausalLM"),
        ("gemma", {"swiglu": False, "rope": False, "rms_norm": True}, "rms_norm (5) in GemmaForCausalLM"),
        ("gemma", {"geglu": True, "rope": False, "rms_norm": False}, "geglu (2) in GemmaForCausalLM"),
        ("gemma", {"swiglu": True, "rope": False, "rms_norm": False}, "geglu (2) in GemmaForCausalLM"),
        ("glm4", {}, "rms_norm (9), swiglu (2) in Glm4ForCausalLM"),
        ("llama", False, "off"),
        ("llama", {"rope": False, "rms_norm": False, "swiglu": False}, "nothing in LlamaForCausalLM"),
        ("cohere", "auto", "not used: Liger does not support model_type='cohere'"),
        ("cohere", {"fused_linear_cross_entropy": True}, "the loss only"),
    ],
)
def test_only_what_is_asked_for_and_what_a_family_has(interpreted, model_type, parts, words):
    assert interpreted.run(_as_on_a_gpu, _words_of, model_type, parts).startswith(words)


@pytest.mark.parametrize(
    ("model_type", "parts", "words"),
    [
        (
            "llama",
            "auto",
            "rms_norm (5), rope (2) in LlamaForCausalLM; not swiglu: in tiles, this package's closed form",
        ),
        ("llama", {"rope": False}, "rms_norm (5) in LlamaForCausalLM; not swiglu: in tiles"),
        ("gemma", {}, "rms_norm (5), rope (2) in GemmaForCausalLM; not geglu: in tiles"),
        ("llama", True, "rms_norm (5), rope (2), swiglu (2) in LlamaForCausalLM"),
        ("llama", {"swiglu": True}, "rms_norm (5), rope (2), swiglu (2) in LlamaForCausalLM"),
        ("gemma", {"swiglu": True}, "geglu (2), rms_norm (5), rope (2) in GemmaForCausalLM"),
        ("gemma", {"geglu": True}, "geglu (2), rms_norm (5), rope (2) in GemmaForCausalLM"),
        ("mixtral", "auto", "rms_norm (5), rope (2), swiglu (2) in MixtralForCausalLM"),  # no closed form of experts
    ],
)
def test_gated_mlps_in_tiles_keep_the_closed_form_unless_ligers_is_asked_for(interpreted, model_type, parts, words):
    found = interpreted.run(_as_on_a_gpu, _words_in_tiles, model_type, parts)
    assert found.startswith(words) and ("closed form" in found) == ("in tiles" in words), found


def _words_in_tiles(model_type: str, parts: Any) -> str:
    return _words_of(model_type, parts, tiled_mlp_compute=True)


@pytest.mark.parametrize(
    ("parts", "words"), [("auto", "rms_norm (5), swiglu (2)"), ({"rope": True}, "rms_norm (5), rope (2)")]
)
def test_layers_in_chunks_keep_their_own_rope(interpreted, parts, words):
    found = interpreted.run(_as_on_a_gpu, _words_in_chunks, parts)
    assert found.startswith(words) and ("not rope: in chunks" in found) == (parts == "auto"), found


def _words_in_chunks(parts: Any) -> str:
    return _words_of("llama", parts, memory_lean_layer=True)


def _other_models() -> None:
    from transformers.models.llama import modeling_llama

    from tests.liger_interpreter import faithful_liger

    model, batch = _model("llama"), family_batch(5, 1)
    names = {name: vars(modeling_llama)[name] for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")}
    with PatchSet() as undo, faithful_liger() as traffic:
        apply_liger(ModelSpec(model), liger_keys(True), "cpu", undo)
        assert all(vars(modeling_llama)[name] is value for name, value in names.items())
        other, copied = _model("llama"), copy.deepcopy(model)
        expected = other(**batch).loss
        assert traffic.written == 0
        # A copy has what the model had, for itself: neither looks into the other.
        torch.testing.assert_close(model(**batch).loss, expected)
        with torch.no_grad():
            copied.model.layers[0].self_attn.q_proj.weight.zero_()
            copied.model.layers[0].mlp.up_proj.weight.zero_()
        torch.testing.assert_close(model(**batch).loss, expected)
        assert abs(copied(**batch).loss - expected) > 1e-3
    other.load_state_dict(model.state_dict())


def test_other_models_of_the_family_stay_as_they_are(interpreted):
    interpreted.run(_other_models)


# --- where it cannot be


class _Norm(torch.nn.Module):
    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def _odd(kind: str) -> torch.nn.Module:
    """A model of a family that Liger knows, with something that it would overlook."""
    if kind == "another activation":
        return _model("llama", hidden_act="gelu")
    if kind == "exact GELU":
        return _model("gemma2", hidden_activation="gelu")
    if kind == "an adapter of norms":
        from peft import LNTuningConfig, get_peft_model

        return get_peft_model(_model("llama"), LNTuningConfig(target_modules=["input_layernorm"]))
    model = _model("llama")
    layer = model.model.layers[1]
    if kind == "another norm":
        layer.input_layernorm = _Norm(layer.input_layernorm)
    elif kind == "a replaced MLP":
        layer.mlp.forward = lambda x: x
    elif kind == "a replaced attention":
        layer.self_attn.forward = layer.self_attn.forward
    elif kind == "fp64":
        model.double()
    return model


ODD = {
    "another activation": ("swiglu", r"mlp has the activation GELUActivation, and Liger would compute swiglu"),
    "exact GELU": ("geglu", r"mlp has the activation GELUActivation, and Liger would compute geglu"),
    "an adapter of norms": ("rms_norm", r"input_layernorm is peft\..*LNTuningLayer, not transformers'"),
    "another norm": (
        "rms_norm",
        r"layers\.1\.input_layernorm is tests\.liger\.test_liger\._Norm, not transformers'",
    ),
    "a replaced MLP": ("swiglu", r"layers\.1\.mlp\.forward has been replaced"),
    "a replaced attention": ("rope", r"layers\.1\.self_attn\.forward has been replaced"),
    "fp64": ("", r"the model is fp64"),
}


def _odd_one(kind: str, parts: Any) -> str:
    model = _odd(kind)
    before = _state_of(model)
    try:
        return _words_of(model, parts)
    finally:
        assert not _left_behind(before)


@pytest.mark.parametrize("kind", ODD)
def test_what_liger_would_compute_otherwise_is_left_out_or_refused(interpreted, kind):
    part, why = ODD[kind]
    words = interpreted.run(_as_on_a_gpu, _odd_one, kind, "auto")
    assert re.search(f"not {part}: .*{why}" if part else f"not used: {why}", words)
    assert not part or f"{part} (" not in words
    for parts in (True, {part or "rope": True}):
        key = r"alst\.liger_kernel" + ("" if parts is True else rf"\.{part or 'rope'}")
        with pytest.raises(UnsupportedModelError, match=f"{key}: .*{why}"):
            interpreted.run(_as_on_a_gpu, _odd_one, kind, parts)


@pytest.mark.parametrize(
    ("model_type", "parts", "words"),
    [
        ("cohere", True, r"liger_kernel: Liger does not support model_type='cohere'. Known are deepseek_v2, "),
        ("cohere", {"rope": True}, r"liger_kernel\.rope: Liger does not support model_type='cohere'"),
        ("olmoe", True, r"does not support model_type='olmoe'. Did you mean 'olmo3'"),
        (
            "nemotron",
            {"rms_norm": True},
            r"rms_norm: Liger has no such kernel here; it has relu_squ.* in Nemotron",
        ),
        ("llama", {"geglu": True}, r"geglu: Liger has no such kernel"),
        ("glm4", {"rope": True}, r"rope: Liger's function for glm4 raised NotImplementedError"),
        ("llama", {"layer_norm": True}, r"layer_norm: Liger has no such kernel"),
    ],
)
def test_what_is_asked_for_by_name_and_cannot_be_had_is_an_error(interpreted, model_type, parts, words):
    with pytest.raises(UnsupportedModelError, match=words):
        interpreted.run(_as_on_a_gpu, _words_of, model_type, parts)


def test_without_a_gpu_auto_says_so_and_loads_nothing_and_true_is_an_error():
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter has leaked out of its process"
    model = _model("llama")
    for parts in ("auto", {}, {"rope": False}):
        with PatchSet() as undo:
            words = apply_liger(ModelSpec(model), liger_keys(parts), "cpu", undo).summary
        assert words.startswith("not used: Liger's kernels need a GPU, and the engine is on cpu")
    for keys, name in (
        ({"liger_kernel": True}, r"alst\.liger_kernel"),
        ({"liger_kernel": {"rope": True}}, r"alst\.liger_kernel\.rope"),
        ({"liger_kernel": {"fused_linear_cross_entropy": True}}, r"liger_kernel\.fused_linear_cross_entropy"),
        ({"tiled_logits_loss": "liger"}, r"alst\.tiled_logits_loss"),
    ):
        with PatchSet() as undo, pytest.raises(SetupError, match=f"{name}: .* GPU.* TRITON_INTERPRET=1"):
            apply_liger(ModelSpec(model), parse({"alst": keys}), "cpu", undo)
    if not torch.cuda.is_available():
        with PatchSet() as undo, pytest.raises(SetupError, match="GPU"):
            tile_loss(ModelSpec(model), TiledLossConfig(backend="liger"), ForwardContext(), lambda module: None, undo)


def _without_the_package(parts: Any) -> str:
    with mock.patch.dict(sys.modules, {"liger_kernel.transformers.monkey_patch": None}):
        return _words_of("llama", parts)


def test_where_it_is_not_installed(interpreted):
    found = interpreted.run(_as_on_a_gpu, _without_the_package, "auto")
    assert found.startswith("not used: liger_kernel cannot be imported (") and "pip install" in found
    with pytest.raises(SetupError, match=r"alst\.liger_kernel: liger_kernel cannot be imported"):
        interpreted.run(_as_on_a_gpu, _without_the_package, True)


def test_auto_stays_off_under_the_interpreter(interpreted):
    assert interpreted.run(_words_of, "llama", "auto").startswith("not used: TRITON_INTERPRET is set")


def _on_unequal_ranks(parts: Any) -> str:
    import torch.distributed as dist

    device = "cpu" if dist.get_rank() else "cuda"
    with PatchSet() as undo:
        return use_liger(ModelSpec(_model("llama")), liger_keys(parts), device, dist.group.WORLD, undo).summary


def test_what_one_rank_cannot_do_none_does(interpreted_ranks):
    for words in interpreted_ranks.run(_as_on_a_gpu, _on_unequal_ranks, "auto"):
        assert words.startswith("not used: Liger's kernels need a GPU") and words.endswith("(rank 1)")
    with pytest.raises(RankError) as caught:
        interpreted_ranks.run(_as_on_a_gpu, _on_unequal_ranks, True)
    assert [type(error) for error in caught.value.errors] == [SetupError] * 2
    assert "rank 1: alst.liger_kernel" in str(caught.value.errors[0])


def _stopping_on_rank_1() -> str:
    import torch.distributed as dist
    from liger_kernel.transformers import monkey_patch

    def stop(**_: Any) -> None:
        raise RuntimeError("no")

    model = _model("llama")
    before = _state_of(model)
    families = {"llama": stop} if dist.get_rank() else {}
    with PatchSet() as undo, mock.patch.dict(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, families):
        words = use_liger(ModelSpec(model), liger_keys("auto"), "cuda", dist.group.WORLD, undo).summary
        assert not _left_behind(before)
    return words


def test_where_ligers_function_stops_on_one_rank_the_others_models_are_given_back(interpreted_ranks):
    for words in interpreted_ranks.run(_as_on_a_gpu, _stopping_on_rank_1):
        assert words == "not used: Liger's function for llama raised RuntimeError: no (rank 1)"


# --- in DeepSpeed's engine, by its key


def _shortened(steps: list) -> list:
    """Two tokens fewer of a sample than of the one before, and few: the interpreter is slow."""
    return [
        [[{key: x[:, : 17 - 2 * index] for key, x in each.items()} for index, each in enumerate(rank)] for rank in step]
        for step in steps
    ]


def _steps(cell: Cell, keys: dict) -> tuple[Any, dict]:
    """A step with these keys of the alst block, and the rows of the report."""
    import benchmarks.cells
    from benchmarks.cells import ds_config, run_alst, run_sp1, samples
    from deepspeed_alst import initialize as story
    from tests.liger_interpreter import faithful_liger

    def with_keys(cell: Cell, sp_size: int) -> dict:
        config = ds_config(cell, sp_size)
        return {**config, "alst": {**config.get("alst", {}), **keys}}

    rows: dict[str, str] = {}
    with (
        mock.patch.object(benchmarks.cells, "ds_config", with_keys),
        mock.patch.object(benchmarks.cells, "STEPS", 1),
        mock.patch.object(benchmarks.cells, "samples", lambda *args: _shortened(samples(*args))),
        mock.patch.object(story, "print_report", rows.update),
        faithful_liger() as traffic,
    ):
        result = run_alst(cell) if cell.sp_size > 1 else run_sp1(cell)
    return result, {**rows, "written": traffic.written}


def _steps_by_key(cell: Cell) -> tuple[float, float, dict]:
    """How far a step by Liger is from one by torch: loss, gradients; and the rows."""
    tiles = {"tiled_mlp_compute": {"tile_tokens": 5}}
    by_torch = {"liger_kernel": False, "tiled_logits_loss": {"tile_tokens": 3, "backend": "torch"}}
    by_liger = {"liger_kernel": True, "tiled_logits_loss": {"tile_tokens": 3}}
    one, without = _steps(cell, {**tiles, **by_torch})
    other, rows = _steps(cell, {**tiles, **by_liger})
    assert "liger" in without["off"]
    rows["written"] -= without["written"]  # by this package's own kernels
    worst = max((((other.grads[n] - grad).norm() / grad.norm()).item() for n, grad in one.grads.items()), default=0.0)
    return abs(one.loss - other.loss), worst, rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        Cell(stage=3, sp_size=2, odd_lengths=True, unequal_labels=True, checkpointing="non-reentrant"),
        Cell(stage=2, sp_size=1, gas=2, odd_lengths=True, unequal_labels=True),
    ],
    ids=Cell.name,
)
def test_a_step_of_an_engine_is_that_of_torchs_tiles(interpreted_ranks, cell):
    found = interpreted_ranks.run(_steps_by_key, cell)
    assert max(loss for loss, _, _ in found) < 1e-6 and 0 < max(grads for _, grads, _ in found) < 4e-6
    for _, _, rows in found:
        assert rows["liger"] == "rms_norm (5), rope (2), swiglu (2) in LlamaForCausalLM" and rows["written"] > 0
        assert "by Liger's kernel" in rows["tiled loss"] and "2 LlamaMLP" in rows["tiled MLP"]


def _loss_keys(keys: dict, sp_size: int) -> dict:
    return _steps(Cell(stage=2, sp_size=sp_size), keys)[1]


@pytest.mark.parametrize(
    ("keys", "sp_size", "liger", "loss"),
    [
        ({"liger_kernel": "auto"}, 2, "not used: Liger's kernels need a GPU", "Linear, tiles of 1024 MiB; by Triton's"),
        ({"liger_kernel": "auto"}, 1, "not used: Liger's kernels need a GPU", "off"),
        pytest.param(
            *({"tiled_logits_loss": "liger", "liger_kernel": False}, 2, "off", "Linear, tiles of 1024 MiB; by Liger's"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_report_says_what_is_used_and_why_not(interpreted_ranks, keys, sp_size, liger, loss):
    for rows in interpreted_ranks.run(_loss_keys, keys, sp_size):
        for name, start in (("liger", liger), ("tiled loss", loss)):
            assert (name in rows["off"]) if start == "off" else rows[name].startswith(start)
        assert "not used" not in rows


# --- a model that is Liger's already


def _ligers_loss(model: Any, on_the_class: bool = False) -> Any:
    """Its fused loss alone, whose kernel is not to be called."""
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_llama

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, model=None if on_the_class else base)
    return model


def _patched_before(cell: Cell, keys: dict, on_the_class: bool = False) -> tuple[float, float]:
    """How far steps of a model with Liger's loss are from those of the model without: loss and gradients."""
    from transformers import LlamaForCausalLM

    import deepspeed_alst
    from benchmarks.cells import _run, ds_config

    forward = LlamaForCausalLM.forward
    config = ds_config(cell, cell.sp_size)
    config = {**config, "alst": {**config.get("alst", {}), **keys}}

    def micro_batches(own: list, engine: Any) -> Any:
        return iter(deepspeed_alst.shard_dataloader(own, engine) if cell.sp_size > 1 else own)

    results = []
    for on_model in (lambda model: model, lambda model: _ligers_loss(model, on_the_class)):
        try:
            results.append(
                _run(cell, config, micro_batches, lambda engine, batch: engine(**batch).loss, on_model=on_model)
            )
        finally:
            LlamaForCausalLM.forward = forward
    one, other = results
    worst = max((((other.grads[n] - grad).norm() / grad.norm()).item() for n, grad in one.grads.items()), default=0.0)
    return abs(one.loss - other.loss), worst


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "keys", "on_the_class"),
    [
        (Cell(stage=3, unequal_labels=True), {}, False),
        (Cell(stage=2), {"tiled_logits_loss": False}, True),
        pytest.param(Cell(stage=2, lora=True), {}, False, marks=pytest.mark.slow),
        (Cell(stage=2, sp_size=1), {"tiled_logits_loss": True}, False),
    ],
    ids=["ZeRO 3", "whole, on the class", "LoRA", "SP 1"],
)
def test_a_model_with_ligers_loss_trains_as_one_without(interpreted_ranks, cell, keys, on_the_class):
    # Not a bit: it is this package's loss, and no kernel runs.
    assert interpreted_ranks.run(_patched_before, cell, keys, on_the_class) == [(0.0, 0.0)] * 2


def _trainer(sp_size: int, is_ligers: bool, **options: Any) -> dict:
    from tests.integrations.test_trainer import documents, facts, make_trainer

    only_loss = {"rope": False, "rms_norm": False, "swiglu": False}
    more = {"use_liger_kernel": True, "liger_kernel_config": only_loss} if is_ligers else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            sp_size,
            folder,
            trainer_arguments={"eval_dataset": documents(6)},
            max_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            **more,
            **options,
        )
        trainer.train()
        result = facts(trainer)
        trainer.model_wrapped.destroy()
    return result


@pytest.mark.parametrize(
    "options",
    [{"prediction_loss_only": True}, pytest.param({"label_smoothing_factor": 0.2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_the_trainer_with_use_liger_kernel_trains_and_evaluates_at_sp2(interpreted_ranks, options):
    from tests.integrations.test_trainer import assert_same

    whole = interpreted_ranks.run(_run_trainer, 1, False, options)[0]
    split = interpreted_ranks.run(_run_trainer, 2, True, options)[0]
    assert any("eval_loss" in line for line in split["log"])
    assert_same(split, whole)


def _run_trainer(sp_size: int, is_ligers: bool, options: dict) -> dict:
    return _trainer(sp_size, is_ligers, **options)


def _patched_by_the_program() -> str:
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_llama

    model = _model("llama")
    apply_liger_kernel_to_llama(model=model)
    before = _state_of(model)
    words = _words_of(model, True)
    assert not _left_behind(before)
    return words


def test_a_model_is_not_patched_twice(interpreted):
    words = interpreted.run(_as_on_a_gpu, _patched_by_the_program)
    assert words == "the program has patched the model with Liger; nothing is changed"
