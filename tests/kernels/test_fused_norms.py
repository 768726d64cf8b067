"""Norms and rotary embedding of models by this package's ops: what is replaced, and that it trains as before."""

import copy
import types
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.cells import KeepFp64, build_model
from benchmarks.families import family_config
from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Interpreted
from benchmarks.kernels.rms_norm import layer_peak
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.integrations import fused_norms, fused_rope
from deepspeed_alst.integrations.fused import fuse_norms_and_rope
from deepspeed_alst.integrations.fused_norms import fuse_norms
from tests.models import family_batch


@contextmanager
def _counting():
    """Counts calls of the two ops by the patches."""
    with (
        mock.patch.object(fused_norms, "rms_norm", side_effect=fused_norms.rms_norm) as norms,
        mock.patch.object(fused_rope, "rope", side_effect=fused_rope.rope) as ropes,
    ):
        yield types.SimpleNamespace(norms=norms, ropes=ropes)


def _model(model_type="llama", **changed):
    config = family_config(model_type, **changed)
    config._experts_implementation = "eager"  # the grouped matrix product of the default has no fp64
    return build_model(config, core="eager" if model_type in ("gemma2", "gpt_oss") else "sdpa").train()


def _step(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    (0.37 * loss).backward()
    return loss.detach().double(), {name: param.grad.double() for name, param in model.named_parameters()}


# --- it trains as the model's own


def _close(grads, others):
    for name, grad in others.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def _errors(model_type, dtype, changed, length=24):
    """Relative errors of loss and of gradients (their mean) against fp64, with the model's own steps and by the ops."""
    model, batch, results = _model(model_type, **changed), family_batch(length, 2), {}
    with torch.no_grad():  # norms' weights that are no longer all alike
        for param in model.parameters():
            if param.dim() == 1:
                param += 0.3 * torch.randn_like(param)
    model = model.to(dtype)
    with KeepFp64():
        results["truth"] = _step(copy.deepcopy(model).double(), batch)
    results["torch"] = _step(copy.deepcopy(model), batch)
    with PatchSet() as undo, _counting() as calls:
        fuse_norms_and_rope(model, undo)
        results["ops"] = _step(model, batch)
    errors, (truth_loss, truth) = {}, results["truth"]
    for name in ("torch", "ops"):
        loss, grads = results[name]
        errors[f"{name} loss"] = abs(loss - truth_loss).item() / truth_loss.item()
        each_one = [((grads[each] - truth[each]).norm() / truth[each].norm()).item() for each in truth]
        errors[name] = sum(each_one) / len(each_one)
    return errors, calls.norms.call_count, calls.ropes.call_count


FAMILIES = [
    ("llama", {}, 5, 2),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, 9, 2),
    ("qwen3", {}, 9, 2),
    ("phi3", {"partial_rotary_factor": 0.5}, 5, 2),
    ("glm", {}, 5, 2),
    ("cohere", {}, 0, 2),
    ("olmo2", {}, 9, 2),
    ("stablelm", {}, 0, 2),
    ("gpt_oss", {"layer_types": ["full_attention"] * 2, "num_local_experts": 4}, 5, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "changed", "num_norms", "num_ropes"), FAMILIES, ids=lambda each: str(each)[:9])
def test_a_model_trains_as_with_its_own_steps(model_type, changed, num_norms, num_ropes, dtype):
    errors, norms, ropes = _errors(model_type, dtype, changed)
    assert (norms, ropes) == (num_norms, num_ropes)
    eps = torch.finfo(dtype).eps
    assert errors["ops"] <= 1.3 * errors["torch"] + eps / 8, errors
    assert errors["ops loss"] <= 3 * errors["torch loss"] + eps, errors


def _interpreted_errors(*args):
    with faithful() as traffic:
        found = _errors(*args)
    assert traffic.written > 0, "no kernel ran"
    return found


def test_a_model_trains_as_with_its_own_steps_by_interpreted_kernels():
    process = Interpreted()
    try:
        for model_type, dtype in (("qwen3", torch.bfloat16), ("glm", torch.float32)):
            errors, norms, ropes = process.run(_interpreted_errors, model_type, dtype, {"num_hidden_layers": 1}, 5)
            assert norms and ropes
            assert errors["ops"] <= 1.3 * errors["torch"] + torch.finfo(dtype).eps / 8, errors
    finally:
        process.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_recomputes_by_the_ops(reentrant):
    model, batch = _model(), family_batch(24, 2)
    with PatchSet() as undo, _counting() as calls:
        own_loss, own = _step(model, batch)
        fuse_norms_and_rope(model, undo)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss, grads = _step(model, batch)
    assert (calls.norms.call_count, calls.ropes.call_count) == (2 * 4 + 1, 2 * 2)
    torch.testing.assert_close(loss, own_loss, rtol=1e-6, atol=0)
    _close(grads, own)


def test_a_first_proof_within_a_checkpoint_leaves_no_trace_in_it():
    with PatchSet() as undo, _counting() as calls:
        model = _model()
        fuse_norms_and_rope(model, undo)
        fused_rope._rotary_of(modeling_llama.apply_rotary_pos_emb)._proven.clear()
        ids = family_batch(24, 1)["input_ids"]
        hidden = checkpoint(lambda x: model.model(inputs_embeds=x).last_hidden_state, model.model.embed_tokens(ids))
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
        hidden.sum().backward()
    assert calls.ropes.call_count == 4


# --- what is replaced, and what stays


class _Centered(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class _Detached(LlamaRMSNorm):
    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (x.float() * scale).to(x.dtype)


class _RoundedScale(LlamaRMSNorm):
    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).to(x.dtype)
        return self.weight * (x * scale)


class _OfOtherTokens(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x.roll(1, 0))


class _AnotherEps(LlamaRMSNorm):
    def forward(self, x):
        self.variance_epsilon, before = 1e-3, self.variance_epsilon
        try:
            return super().forward(x)
        finally:
            self.variance_epsilon = before


def _hooked():
    norm = LlamaRMSNorm(32)
    norm.register_forward_hook(lambda module, args, output: None)
    return norm


def _with_own_forward():
    norm = LlamaRMSNorm(32)
    norm.forward = lambda x: x
    return norm


STAY = (
    *(kind(32) for kind in (_Centered, _Detached, _RoundedScale, _OfOtherTokens, _AnotherEps)),
    _hooked(),
    _with_own_forward(),
    torch.nn.LayerNorm(32, bias=False),
    torch.nn.utils.parametrizations.weight_norm(LlamaRMSNorm(32), dim=None),
    torch.nn.BatchNorm1d(32),
    torch.nn.Dropout(1e-3),
    torch.nn.LeakyReLU(1e-3),
)


@pytest.mark.parametrize("module", STAY, ids=lambda module: type(module).__name__)
def test_a_module_that_computes_something_else_or_that_something_hangs_on_stays(module):
    before = dict(vars(module))
    state = torch.get_rng_state()
    with PatchSet() as undo:
        assert not fuse_norms(module, undo)
        assert vars(module) == before and torch.equal(torch.get_rng_state(), state)


def test_a_fused_norm_takes_its_own_forward_where_the_proof_does_not_hold():
    norm = LlamaRMSNorm(32)
    own = copy.deepcopy(norm)
    with PatchSet() as undo, _counting() as calls:
        assert fuse_norms(norm, undo) == {"LlamaRMSNorm": 1}
        for x in (torch.randn(3, 32).double(), torch.randn(3, 32).bfloat16()):  # other than the weight's fp32
            assert torch.equal(norm(x), own(x)) and norm(x).dtype == own(x).dtype
        assert torch.equal(norm(hidden_states=torch.ones(2, 32)), own(torch.ones(2, 32)))
        assert not calls.norms.called
        torch.testing.assert_close(norm(torch.ones(2, 32)), own(torch.ones(2, 32)))
        assert calls.norms.called


def test_a_compiler_sees_the_modules_own_steps():
    layer = _model().model.layers[0]
    hidden, tables = torch.randn(1, 5, 32), torch.randn(2, 1, 5, 8).unbind()
    own, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=tables, attention_mask=None)
    with PatchSet() as undo, _counting() as calls:
        fuse_norms_and_rope(layer, undo)

        @torch.compile(backend="eager", fullgraph=True)
        def compiled(x):
            return layer.self_attn(layer.input_layernorm(x), position_embeddings=tables, attention_mask=None)[0]

        found = compiled(hidden)
        assert not calls.norms.called and not calls.ropes.called
    torch.testing.assert_close(found, own)


def test_undo_gives_everything_back():
    function, model = modeling_llama.apply_rotary_pos_emb, _model()
    before = [dict(vars(module)) for module in model.modules()]
    with PatchSet() as undo:
        words = fuse_norms_and_rope(model, undo)
        assert words.startswith("5 LlamaRMSNorm and 2 LlamaAttention (rotary embedding) by a kernel")
        assert modeling_llama.apply_rotary_pos_emb is function
    assert [dict(vars(module)) for module in model.modules()] == before


def test_two_models_of_a_family_come_and_go_in_any_order():
    function, batch = modeling_llama.apply_rotary_pos_emb, family_batch(24, 2)
    first, second, other = PatchSet(), PatchSet(), _model()
    models = _model(), _model()
    fuse_norms_and_rope(models[0], first)
    fuse_norms_and_rope(models[1], second)
    with _counting() as calls:
        _step(other, batch)  # a model of somebody else's
        assert not calls.ropes.called and not calls.norms.called
        first.close()
        _step(models[0], batch)
        assert not calls.ropes.called
        _step(models[1], batch)
        assert calls.ropes.call_count == 2
    second.close()
    assert modeling_llama.apply_rotary_pos_emb is function


def test_a_copy_of_a_model_runs_on_its_own_weights():
    model, batch = _model(), family_batch(24, 2)
    with PatchSet() as undo:
        fuse_norms_and_rope(model, undo)
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for param in copied.parameters():
                param.mul_(1.5)
        own = _model()
        own.load_state_dict(copied.state_dict())
        loss, grads = _step(copied, batch)
        assert all(param.grad is None for param in model.parameters())
    own_loss, own_grads = _step(own, batch)
    torch.testing.assert_close(loss, own_loss, rtol=1e-6, atol=0)
    _close(grads, own_grads)


def test_a_rotation_of_another_form_stays(monkeypatch):
    original, model = modeling_llama.apply_rotary_pos_emb, _model()
    others = (
        lambda q, k, cos, sin, unsqueeze_dim=1: original(q, k, cos, -sin, unsqueeze_dim),
        lambda q, k, cos, sin, unsqueeze_dim=1: original(q, 1.001 * k, cos, sin, unsqueeze_dim),
        lambda q, k, cos, sin, unsqueeze_dim=1: original(q.detach(), k, cos, sin, unsqueeze_dim),
        lambda x, cos, sin: x,
        None,
    )
    for other in others:
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
        with PatchSet() as undo:
            assert not fused_rope.fuse_rope(model, undo)
            assert modeling_llama.apply_rotary_pos_emb is other


def test_where_no_kernel_runs_a_model_keeps_its_own():
    model = _model()
    no_kernel = mock.patch("deepspeed_alst.integrations.fused.has_kernel", lambda *_: False)
    with PatchSet() as undo, no_kernel, mock.patch("torch.cuda.is_available", lambda: True):
        assert fuse_norms_and_rope(model, undo) == "the model's own"
    with PatchSet() as undo:
        assert fuse_norms_and_rope(None, undo) == "the model's own"


def test_a_layer_of_a_real_model_needs_less_at_its_peak():
    own, ours = (layer_peak("llama", "non-reentrant", fused) for fused in (False, True))
    assert ours <= 0.75 * own, (own, ours)


# --- in DeepSpeed's engine


def _steps_of_an_engine(dtype, checkpointing):
    """Errors of three steps on ZeRO 3 against fp64, without the ops and with them, and how often each of them ran.

    Errors are relative: the loss's, and the mean of the gradients' and of the weights' changes'; on rank 0.
    """
    from benchmarks.cells import Cell, run_alst, run_truth

    cell = Cell(stage=3, dtype=dtype, gas=2, odd_lengths=True, checkpointing=checkpointing)
    truth, own = run_truth(cell), run_alst(cell)
    with mock.patch("deepspeed_alst.integrations.feature._fuses", lambda run, is_patched: True), _counting() as calls:
        ours = run_alst(cell)
    errors = []
    for run in (own, ours):
        pairs = [(run.grads, truth.grads), (run.changes, truth.changes)]
        far = [[((found[n] - right[n]).norm() / right[n].norm()).item() for n in found] for found, right in pairs]
        errors.append([abs(run.loss - truth.loss) / truth.loss, *(sum(each) / max(1, len(each)) for each in far)])
    return *errors, calls.norms.call_count, calls.ropes.call_count


@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [("fp32", ""), pytest.param("bf16", "non-reentrant", marks=pytest.mark.slow)]
)
def test_steps_of_an_engine_are_as_near_to_fp64_as_the_models_own(ranks2, dtype, checkpointing):
    for own, ours, norms, ropes in ranks2.run(_steps_of_an_engine, dtype, checkpointing):
        rounding = torch.finfo({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eps
        last = 2 if dtype == "bf16" else 3  # two more steps make any rounding in bf16 larger, one way or the other
        assert all(mine <= 1.5 * theirs + rounding for mine, theirs in list(zip(ours, own, strict=True))[:last])
        times = 2 if checkpointing else 1  # 3 steps of 4 micro-steps
        assert (norms, ropes) == (12 * (4 * times + 1) + 6 * 5, 12 * 2 * times + 6 * 2)  # 6 forwards of the model check


def _fused_while_partitioned():
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        norm = LlamaRMSNorm(4096)
    with PatchSet() as undo:
        return norm.weight.numel(), fuse_norms(norm, undo)


def test_a_weight_that_is_elsewhere_needs_no_gathering_for_the_proof(ranks2):
    assert ranks2.run(_fused_while_partitioned) == [(0, {"LlamaRMSNorm": 1})] * 2
