"""The live model, whole against split before its first step: what a program may change in it, and what then happens."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama as llama
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import deepspeed_alst
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import AlstError
from deepspeed_alst.verification import feature, verify_model
from deepspeed_alst.verification.model_check import Routed, lengths
from deepspeed_alst.verification.program_code import program_code
from deepspeed_alst.verification.verify_model import untouched

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
    "sequence_parallel_size": 2,
    "alst": {"pad_to_multiple_of": 16},
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "use_cache": False,
}


def build(cls: type = LlamaForCausalLM, config: Any = LlamaConfig, **changed: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return cls(config(**SIZES, **changed))


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def registered(interface: Any, name: str, function: Any):
    before = interface._global_mapping[name]
    interface.register(name, function)
    try:
        yield
    finally:
        interface.register(name, before)


def method(cls: str, make: Callable[[Any], Any]):
    """A method of a class of transformers' that the program has replaced."""
    return lambda model: replaced(getattr(llama, cls), "forward", make(getattr(llama, cls).forward))


def hook(name: str, function: Any, register: str = "register_forward_hook"):
    return lambda model: contextlib.closing(_Handle(getattr(model.get_submodule(name), register)(function)))


class _Handle:
    def __init__(self, handle: Any) -> None:
        self.close = handle.remove


def counted_from_0(original):
    return lambda self, x, position_ids: original(self, x, torch.arange(x.shape[1])[None])


def late_by_length(original):
    def forward(self, x, position_ids):
        cos, sin = original(self, x, position_ids)
        return (cos * x.shape[1] / 32, sin) if position_ids.max() >= 200 else (cos, sin)

    return forward


def seeing_the_token_before(original):
    return lambda self, x, *a, **k: original(self, torch.cat([x[:, :1], x[:, 1:] + 0.5 * x[:, :-1]], 1), *a, **k)


def by_length(original):
    return lambda self, x: original(self, x) * x.shape[1] / 32


def doubled(original):
    return lambda self, x: 2 * original(self, x)


def wrapped_on_the_instance(name: str, after: Callable[[torch.Tensor], torch.Tensor]):
    """``module.forward`` of one module, in a closure around what it was."""

    def install(model):
        module = model.get_submodule(name)
        before = module.forward
        return replaced(module, "forward", lambda *args, **kwargs: after(before(*args, **kwargs)))

    return install


def rotated_by_length(original):
    return lambda q, k, cos, sin, *rest, **more: original(q * q.shape[2] / 32, k, cos, sin, *rest, **more)


def attention_of_the_programs(module, query, key, value, mask, dropout=0.0, scaling=None, **kwargs):
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=0.5 * scaling, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


class PutIn(torch.nn.Module):
    def __init__(self, inner, after):
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x):
        return self.after(self.inner(x))


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


def put_in(after):
    return lambda model: replaced(model.model.layers[0], "mlp", PutIn(model.model.layers[0].mlp, after))


def gradient_hook(function):
    return lambda model: contextlib.closing(_Handle(model.model.embed_tokens.weight.register_hook(function)))


def scaled(module, args, output):
    return 3 * output


CHANGES: dict[str, tuple[Any, str]] = {
    "rotary embedding counts positions itself": (method("LlamaRotaryEmbedding", counted_from_0), "refused"),
    "rotary embedding by length at late positions": (method("LlamaRotaryEmbedding", late_by_length), "refused"),
    "decoder layer sees the token before": (method("LlamaDecoderLayer", seeing_the_token_before), "refused"),
    "MLP scaled by the sequence's length": (method("LlamaMLP", by_length), "refused"),
    "MLP output multiplied by 2": (method("LlamaMLP", doubled), "right"),
    "function of the model's source by length": (
        lambda model: replaced(llama, "apply_rotary_pos_emb", rotated_by_length(llama.apply_rotary_pos_emb)),
        "refused",
    ),
    "hook, mean over the sequence": (
        hook("model.embed_tokens", lambda _, i, o: o - o.mean(1, keepdim=True)),
        "refused",
    ),
    "hook, running sum": (hook("model.layers.0", lambda _, i, o: first(o) + 0.1 * first(o).cumsum(1)), "refused"),
    "hook, last token": (hook("model.norm", lambda _, i, o: torch.cat([o[:, :-1], 2 * o[:, -1:]], 1)), "refused"),
    "hook, previous token": (
        hook("model.layers.1", lambda _, i: (i[0].flip(1), *i[1:]), "register_forward_pre_hook"),
        "refused",
    ),
    "hook, token by token": (hook("model.norm", scaled), "right"),
    "hook that only reads": (hook("model.layers.0", lambda _, i, o: None), "right"),
    "backward hook, scaled by the norm of a shard": (
        hook("model.norm", lambda _, i, o: (i[0] / i[0].norm(),), "register_full_backward_hook"),
        "refused",
    ),
    "forward of one layer, running mean": (
        wrapped_on_the_instance("model.layers.0", lambda o: first(o).cumsum(1)),
        "refused",
    ),
    "forward of one MLP, token by token": (wrapped_on_the_instance("model.layers.0.mlp", lambda o: 2 * o), "right"),
    "forward of one MLP, backward by the norm": (
        wrapped_on_the_instance("model.layers.0.mlp", _Rescaled.apply),
        "refused",
    ),
    "forward of the model, token by token": (wrapped_on_the_instance("model", lambda o: o), "right"),
    "gradient hook, a mask": (gradient_hook(lambda grad: grad * (torch.arange(64) > 9)[:, None]), "right"),
    "gradient hook, clipped": (gradient_hook(lambda grad: grad.clamp(-1, 1)), "refused"),
    "custom module, token by token": (put_in(torch.tanh), "right"),
    "custom module that mixes tokens": (put_in(lambda x: x - x.mean(1, keepdim=True)), "refused"),
    "custom module, backward by the norm": (put_in(_Rescaled.apply), "refused"),
    "attention under transformers' name": (
        lambda model: registered(AttentionInterface, "sdpa", attention_of_the_programs),
        "right",
    ),
    "masks under transformers' name": (
        lambda model: registered(AttentionMaskInterface, "sdpa", lambda *args, **kwargs: None),
        "refused",
    ),
}


def what_happens(name: str, later: bool) -> str:
    """Of the program's change: ``right``, ``refused`` or what it is off by; made before or after initialize."""
    rank, change = dist.get_rank(), CHANGES[name][0]
    ids = torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(rank))
    model, engine = build(), None
    with PatchSet() as undo:
        if not later:
            undo.enter_context(change(model))
        try:
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=json.loads(json.dumps(CONFIG))
            )
            if later:
                undo.enter_context(change(model))
            loader = deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine)
            found = [float(engine(**batch).loss) for batch in loader]
        except AlstError:
            return "refused"
        finally:
            if engine is not None:
                engine.destroy()
        losses = [torch.zeros(()) for _ in range(2)]
        dist.all_gather(losses, model(input_ids=ids, labels=ids).loss.detach())
    off = max(abs(a - float(b)) for a, b in zip(found, losses, strict=True))
    return "right" if off < 1e-4 else f"off by {off}"


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_programs_is_right_or_refused(name, ranks2):
    assert ranks2.run(what_happens, name, False) == [CHANGES[name][1]] * 2


@pytest.mark.parametrize("name", ["hook, running sum", "forward of one layer, running mean", "hook, token by token"])
def test_a_change_after_initialize_is_seen_too(name, ranks2):
    assert ranks2.run(what_happens, name, True) == [CHANGES[name][1]] * 2


def test_experts_are_those_of_the_recorded_run():
    first, second = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    groups = SimpleNamespace(sp_size=2, sp_rank=1)
    with Routed(None, groups, None) as recorded:
        _, chosen = torch.topk(first, 2)
    with Routed(recorded.chosen, groups, None):
        values, replayed = torch.topk(second[3:], 2)
    assert torch.equal(replayed, chosen[3:]) and torch.equal(values, second[3:].gather(1, chosen[3:]))


def test_lengths_reach_beyond_windows_and_to_the_last_position():
    assert lengths(ModelSpec(build(max_position_embeddings=512)), 2) == (34, 34, 478)
    narrow = build(MistralForCausalLM, MistralConfig, sliding_window=50, max_position_embeddings=512)
    assert lengths(ModelSpec(narrow), 4) == (68, 100, 412)
    wide = build(MistralForCausalLM, MistralConfig, sliding_window=9000, max_position_embeddings=10**6)
    assert lengths(ModelSpec(wide), 2) == (34, 8192, 10**6 - 8192)


def refusal() -> str:
    model = build()
    with method("LlamaMLP", by_length)(model):
        engine = None
        try:
            # No trial: of the live check's own words.
            with (
                replaced(verify_model, "run_isolated", lambda *args: None),
                replaced(feature, "verify_model", lambda *args: ""),
            ):
                engine, *_ = deepspeed.initialize(
                    model=model, model_parameters=model.parameters(), config=json.loads(json.dumps(CONFIG))
                )
                ids = torch.full((1, 16), 1 + dist.get_rank())
                loader = deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine)
                engine(**next(iter(loader)))
        except AlstError as error:
            return str(error)
        finally:
            if engine is not None:
                engine.destroy()
    return ""


def test_a_refusal_names_the_first_module_that_differs(ranks2):
    for words in ranks2.run(refusal):
        assert "model.layers.0.mlp (LlamaMLP) is the first module whose output differs" in words
        assert "alst.check_model" in words


def trained(stage: int, checked: bool, half: bool) -> tuple[list[torch.Tensor], int]:
    """The weights after two steps of a mixture, and how often the model was checked."""
    model = build(MixtralForCausalLM, MixtralConfig, num_local_experts=4, output_router_logits=True)
    config = json.loads(json.dumps(CONFIG))
    config["zero_optimization"]["stage"] = stage
    config["bf16"] = {"enabled": half}
    config["alst"] |= {"check_model": checked, "tiled_mlp_compute": {"tile_tokens": 5}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    made = torch.Generator().manual_seed(dist.get_rank())
    batches = [{"input_ids": (ids := torch.randint(0, 64, (1, 40), generator=made)), "labels": ids} for _ in range(2)]
    with mock.patch.object(verify_model, "check_live_model", wraps=verify_model.check_live_model) as check:
        for batch in deepspeed_alst.shard_dataloader(batches, engine):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = [param.detach().clone() for param in engine.module.parameters()]
    engine.destroy()
    return weights, check.call_count


@pytest.mark.parametrize(("stage", "half"), [(0, False), (2, True), (3, True)])
def test_a_checked_run_is_the_unchecked_one_to_the_bit(stage, half, ranks2):
    with_check, without = (ranks2.run(trained, stage, checked, half) for checked in (True, False))
    for (mine, checks), (others, none) in zip(with_check, without, strict=True):
        assert (checks, none) == (1, 0)
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


class ZeRO3Leaves(torch.nn.Module):
    """Leaves a trace wherever a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.plain, self.seen, self.number = torch.zeros(2), [torch.zeros(1)], 0
        self.config = LlamaConfig()

    def forward(self, x):
        self.count += 1
        self.plain.mul_(0).add_(torch.rand(2))
        self.seen[0] += 1
        self.seen.append(x)
        self.number += 1
        self.new = x
        self.config.use_cache = not self.config.use_cache
        self.register_forward_hook(lambda *args: None)
        self.register_buffer("later", x)
        self.train(not self.training)
        return functools.reduce(torch.add, [x, torch.rand(3)])


def test_what_is_untouched_is_as_before_to_the_bit():
    module = ZeRO3Leaves()
    count, plain, inner, config = module.count, module.plain, module.seen[0], module.config
    before, seed = dict(vars(module)), torch.random.get_rng_state()
    with untouched(module), torch.no_grad():
        module(torch.ones(3))
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert list(vars(module)) == list(before) and module.training and module.number == 0
    assert module.count is count and not count.any() and not plain.any() and module.plain is plain
    assert len(module.seen) == 1 and module.seen[0] is inner and not inner.any()
    assert config.use_cache is True and not module._forward_hooks and list(module._buffers) == ["count"]


def test_the_docs_have_a_row_for_each_change():
    page = (Path(__file__).parents[2] / "docs" / "limitations.md").read_text(encoding="utf-8")
    for name, (_, verdict) in CHANGES.items():
        assert f"| {name} | {verdict} |" in page


def test_a_stock_model_has_no_code_of_the_programs():
    assert program_code(build()) == ()
