"""Layers in chunks on one rank: what is released, what stays on the ordinary path, what a test would see."""

import contextlib
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AttentionInterface

import deepspeed_alst
from benchmarks.cells import build_model
from benchmarks.families import family_config
from deepspeed_alst.attention.hf_attention import find_backend
from deepspeed_alst.attention.rectangles import rectangles
from deepspeed_alst.config.schema import MemoryLeanConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import SetupError
from deepspeed_alst.memory_lean import core, layer
from deepspeed_alst.memory_lean.chunks import UnsupportedLayerError
from deepspeed_alst.memory_lean.feature import run_in_chunks
from deepspeed_alst.memory_lean.parts import AttentionCall, with_mask
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy
from deepspeed_alst.offload.host_buffers import HostBufferPool
from tests.models import family_batch, step_in_fp64

LEAN = MemoryLeanConfig(chunk_tokens=8, tile_tokens=3, key_block=5)
TOKENS = 19


@contextlib.contextmanager
def lean_model(policy=None, dtype=torch.float32, model_type="llama", **keys):
    """A small checkpointed model in training mode whose layers run in chunks."""
    model = build_model(family_config(model_type, **keys)).to(dtype).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with PatchSet() as patches:
        count, reasons = run_in_chunks(
            ModelSpec(model), LEAN, None, ForwardContext(), lambda layer: None, patches, policy
        )
        assert count == 2 and not reasons
        yield model


def gradients(model, rows=2):
    torch.manual_seed(3)  # for dropout
    loss = model(**family_batch(TOKENS, rows), use_cache=False).loss
    loss.backward()
    return {name: param.grad for name, param in model.named_parameters()}


def ordinary_gradients(change=lambda model: None, model_type="llama", **keys):
    model = build_model(family_config(model_type, **keys)).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    change(model)
    return gradients(model)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_a_second_backward_of_one_graph_is_refused():
    with lean_model() as model:
        loss = model(**family_batch(TOKENS, 1), use_cache=False).loss
        loss.backward(retain_graph=True)
        with pytest.raises(SetupError, match="second backward of one graph"):
            loss.backward()


@pytest.mark.parametrize("saves_attention", [False, True])
def test_every_chunk_is_offloaded_once_and_released(saves_attention):
    store = ActivationStore(HostBufferPool())
    policy = CheckpointPolicy(store, num_saved=2 * saves_attention)
    with lean_model(policy) as model:
        policy.layers = list(model.model.layers)
        found = gradients(model)
        config = model.config
        hidden, heads = config.hidden_size, config.num_attention_heads
        per_token = 3 * hidden + 2 * (hidden + heads) * saves_attention  # two layers and the last norm
        assert store.counts.bytes_out == 2 * TOKENS * per_token * 4
        assert store.pool.in_use == 0
    assert_close(found, ordinary_gradients())


def test_chunks_of_a_backward_that_never_comes_are_released():
    store = ActivationStore(HostBufferPool())
    with lean_model(CheckpointPolicy(store)) as model:
        loss = model(**family_batch(TOKENS, 2), use_cache=False).loss
        assert store.pool.in_use > 0
        del loss
        store.release_copied()
        assert store.pool.in_use == 0


def test_embeddings_are_freed_once_they_are_saved_and_a_read_of_them_is_nan():
    with lean_model() as model:
        kept, original = SimpleNamespace(), model.model.embed_tokens.forward
        model.model.embed_tokens.forward = lambda ids: vars(kept).update(x=original(ids)) or kept.x
        loss = model(**family_batch(TOKENS, 2), use_cache=False).loss
        assert kept.x.untyped_storage().nbytes() == kept.x.element_size() and kept.x.isnan().all()
        loss.backward()
    assert_close({name: param.grad for name, param in model.named_parameters()}, ordinary_gradients())


def test_embeddings_that_a_hook_of_the_program_sees_are_kept():
    with lean_model(CheckpointPolicy(ActivationStore(HostBufferPool()))) as model:
        read = []
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: read.append(output))
        gradients(model)
        assert read[0].sum().isfinite()


@contextlib.contextmanager
def between_layers(model, note):
    """Call ``note`` with the stream between the two layers, as the decoder's own code would."""
    original = model.model.layers[1].forward

    def forward(x, **kwargs):
        note(x)
        return original(x, **kwargs)

    with mock.patch.object(model.model.layers[1], "forward", forward):
        yield


def test_a_layers_output_takes_the_memory_of_its_input():
    with lean_model() as model:
        memories, run = [], layer.LeanCall.forward

        def noting(call, x, saves):
            y, *records = run(call, x, saves)
            memories.append((x.untyped_storage()._cdata, y.untyped_storage()._cdata))
            return y, *records

        with mock.patch.object(layer.LeanCall, "forward", noting):
            found = gradients(model)
    ((first, second), (third, last)) = memories
    assert first == second == third == last
    assert_close(found, ordinary_gradients())


@pytest.mark.parametrize("keep", [lambda x: x[:, -1], lambda x: x.detach()])
def test_a_stream_that_something_else_refers_to_keeps_its_memory(keep):
    with lean_model() as model:
        kept = []
        with between_layers(model, lambda x: kept.extend((keep(x), keep(x.clone())))):
            found = gradients(model)
        assert torch.equal(*kept)
    assert_close(found, ordinary_gradients())


def test_a_term_made_of_the_stream_between_layers_has_its_gradient():
    def with_term(model):
        terms = []
        with between_layers(model, lambda x: terms.append(x.square().mean())):
            loss = model(**family_batch(TOKENS, 2), use_cache=False).loss
        (loss + terms[0]).backward()
        return {name: param.grad for name, param in model.named_parameters()}

    with lean_model() as model:
        found = with_term(model)
    ordinary = build_model(family_config("llama")).train()
    assert_close(found, with_term(ordinary))


def turn_checkpointing_off(model):
    model.activation_checkpointing_disable()


def add_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 1.5)


def drop_attention(model):
    for each in model.model.layers:
        each.self_attn.attention_dropout = 0.5


@pytest.mark.parametrize(
    ("change", "keys", "reason"),
    [
        (add_hook, {}, "a hook of the program inside the layer"),
        (turn_checkpointing_off, {}, "gradient checkpointing was turned off"),
        (drop_attention, {}, "attention with dropout, whose draws chunks cannot repeat"),
        (drop_attention, {"model_type": "mistral", "sliding_window": 5}, "attention with dropout"),
        (lambda model: None, {"model_type": "phi3", "resid_pdrop": 0.5}, "dropout at sequence_parallel_size 1"),
    ],
)
def test_a_layer_that_chunks_cannot_run_is_ordinary_and_says_so(change, keys, reason):
    with lean_model(**keys) as model:
        change(model)
        with pytest.warns(UserWarning, match=f"ordinary path: .*{reason}"):
            found = gradients(model)
    assert_close(found, ordinary_gradients(change, **keys))


@pytest.mark.parametrize(
    ("change", "keys", "reason"),
    [
        (lambda model: None, {"attention_dropout": 0.5}, "attention with dropout (attention_dropout=0.5) at"),
        (
            lambda model: model.model.layers[0].compile(backend="eager"),
            {"model_type": "mistral", "sliding_window": 5},
            "the program has replaced or compiled MistralDecoderLayer's forward",
        ),
        (
            lambda model: None,
            {"model_type": "llama4_text", "attention_chunk_size": 5, "no_rope_layers": [1, 0], "floor_scale": 4}
            | {"interleave_moe_layer_step": 9},
            "queries scaled by their index in the input",
        ),
        (
            lambda model: model.set_attn_implementation("eager"),
            {},
            "attn_implementation='eager' at sequence_parallel_size 1; use 'sdpa'",
        ),
    ],
)
def test_a_layer_that_is_ordinary_from_the_start_is_reported_and_right(change, keys, reason):
    model_type = keys.get("model_type", "llama")
    model = build_model(family_config(**{"model_type": model_type} | keys)).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    change(model)
    with PatchSet() as patches, warnings.catch_warnings():
        warnings.filterwarnings("error", message="alst.memory_lean_layer")
        _, reasons = run_in_chunks(ModelSpec(model), LEAN, None, ForwardContext(), lambda layer: None, patches)
        assert [each for each in reasons if reason in each]
        assert_close(gradients(model), ordinary_gradients(change, **keys))


def test_attention_without_a_kernel_is_ordinary(monkeypatch):
    model = build_model(family_config("llama"))
    model.config._attn_implementation = "flex_attention"
    with PatchSet() as patches:
        count, reasons = run_in_chunks(ModelSpec(model), LEAN, None, ForwardContext(), lambda layer: None, patches)
    assert count == 0 and reasons == {"attn_implementation='flex_attention' at sequence_parallel_size 1; use 'sdpa'": 2}
    q = torch.zeros(1, 2, 3, 8)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **kwargs: None)
    for name, arguments, what in (("sdpa", {}, ""), ("flex_attention", {"head_mask": q}, " with head_mask")):
        call = AttentionCall(q, q, q, None, None, arguments, find_backend(name))
        with pytest.raises(UnsupportedLayerError, match=f"no kernel for attn_implementation='{name}'{what}"):
            with_mask(call, ForwardContext())


def test_a_compiled_model_runs_its_layers_in_chunks():
    keys = {"model_type": "mistral", "sliding_window": 5}
    with lean_model(**keys) as model, warnings.catch_warnings():
        warnings.filterwarnings("error", message="alst.memory_lean_layer")
        compiled = torch.compile(model, backend="eager")
        compiled(**family_batch(TOKENS, 2), use_cache=False).loss.backward()
        found = {name: param.grad for name, param in model.named_parameters()}
    assert_close(found, ordinary_gradients(**keys))


def test_a_hook_that_comes_later_is_refused():
    with lean_model() as model:
        gradients(model)
        add_hook(model)
        with pytest.raises(SetupError, match="a hook was registered inside LlamaDecoderLayer after its first"):
            gradients(model)


def hook_on_one_rank():
    """Losses with a hook on rank 0 alone that changes nothing, with and without memory-lean layers; the warnings."""
    import deepspeed

    losses, caught = [], []
    for lean in ({"chunk_tokens": 8, "tile_tokens": 3}, False):
        model = build_model(family_config("llama")).train()
        alst = {"memory_lean_layer": lean, "pad_to_multiple_of": 2}
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "sequence_parallel_size": 2}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config | {"alst": alst})
        if dist.get_rank() == 0:
            model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: None)
        with warnings.catch_warnings(record=True) as caught_now:
            warnings.simplefilter("always")
            for batch in deepspeed_alst.shard_dataloader([family_batch(TOKENS, 1)], engine):
                loss = engine(**batch).loss
                engine.backward(loss)
                losses.append(float(loss))
        caught += [str(each.message) for each in caught_now if "alst.memory_lean_layer" in str(each.message)]
        engine.destroy()
    return losses, caught


def test_a_hook_on_one_rank_makes_the_layer_ordinary_on_all(ranks2):
    for losses, caught in ranks2.run(hook_on_one_rank):
        assert caught and all("a hook of the program inside the layer" in each for each in caught)
        assert losses[: len(losses) // 2] == pytest.approx(losses[len(losses) // 2 :], rel=1e-6)


def test_without_gradients_and_in_evaluation_the_output_is_the_same():
    batch = family_batch(TOKENS, 2)
    expected = build_model(family_config("llama"))(**batch, use_cache=False).logits
    with lean_model() as model, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (True, False):
            logits = model.train(mode)(**batch, use_cache=False).logits
            assert (logits - expected).norm() <= 1e-6 * expected.norm()


def test_frozen_weights_get_no_gradient_and_the_others_the_same():
    def freeze(model):
        for name, param in model.named_parameters():
            param.requires_grad_("q_proj" in name or "down_proj" in name)

    with lean_model() as model:
        freeze(model)
        model.enable_input_require_grads()
        found = {name: grad for name, grad in gradients(model).items() if grad is not None}
    expected = {name: grad for name, grad in ordinary_gradients(freeze).items() if grad is not None}
    assert_close(found, expected)


def error_in_fp64():
    batch = family_batch(TOKENS, 2)
    (loss, grads), (true_loss, true) = (step_in_fp64(family_config("llama"), batch, lean=lean) for lean in (LEAN, None))
    errors = [float((grads[name] - each).norm() / each.norm()) for name, each in true.items()]
    return max(abs(loss - true_loss) / true_loss, *errors)


_RIGHT = core.add_gradients


def swapped(dq, dk, dv, *rest):
    return _RIGHT(dq, dv, dk, *rest)


def off_by_one(*args):
    for part in rectangles(*args):
        is_wide = not part.triangle and part.last_key - part.first_key > 1
        yield part._replace(last_key=part.last_key - is_wide)


@pytest.mark.parametrize(("name", "wrong"), [("add_gradients", swapped), ("rectangles", off_by_one)])
def test_a_wrong_step_would_be_seen(name, wrong):
    assert error_in_fp64() < 1e-12
    with mock.patch.object(core, name, wrong):
        assert error_in_fp64() > 1e-3


def test_weight_gradients_in_bf16_are_summed_in_fp32():
    """Tiles of 3 tokens: sums in bf16 lose more than one rounding of each weight's gradient does."""
    name = "model.layers.0.mlp.up_proj.weight"
    true, sums = ordinary_gradients()[name], layer.WeightGradients

    def error():
        with lean_model(dtype=torch.bfloat16) as model:
            return float((gradients(model)[name].double() - true).norm())

    in_fp32 = error()
    with mock.patch.object(layer, "WeightGradients", lambda weights, tiles, fp32: sums(weights, tiles, not fp32)):
        assert error() > in_fp32


class Mixing(torch.nn.Linear):
    """A projection to which each token adds a bit of the one before it, or has a gate to do so."""

    def forward(self, x):
        return super().forward(x + self.gate * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize(("name", "gate"), [("self_attn.k_proj", 1e-3), ("mlp.up_proj", 1e-3), ("mlp.up_proj", 0.0)])
def test_a_layer_that_mixes_tokens_outside_of_its_attention_is_ordinary(name, gate):
    def mix(model):
        for each in model.model.layers:
            module = each.get_submodule(name)
            module.__class__ = Mixing
            module.gate = torch.nn.Parameter(torch.tensor(gate))

    with lean_model() as model:
        mix(model)
        with pytest.warns(UserWarning, match="LlamaDecoderLayer mixes tokens outside of its attention"):
            found = gradients(model)
    assert_close(found, ordinary_gradients(mix))


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        ("falcon_h1", {}, "mixes tokens outside of its attention"),
        (
            "gemma3n_text",
            {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
            r"an input of shape \[4, 2, 19",
        ),
    ],
)
def test_a_family_that_cannot_be_cut_is_ordinary(model_type, keys, reason):
    """Mamba beside attention, in a layer that returns a tuple; four streams."""
    config = family_config(model_type, **keys)
    expected = gradients(build_model(config).train())
    model = build_model(config).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with PatchSet() as patches, pytest.warns(UserWarning, match=reason):
        run_in_chunks(ModelSpec(model), LEAN, None, ForwardContext(), lambda layer: None, patches)
        found = gradients(model)
    assert_close(found, expected)


def keeps_first(decoder, x):
    """Add the first layer's output to the last one's, as decoders with a skip over layers do."""
    first = None
    for each in decoder.layers:
        x = each(x, position_embeddings=decoder.rotary_emb(x, torch.arange(TOKENS)[None]))
        first = x if first is None else first
    return x + first


def keeps_all(decoder, x):
    """Add all states, kept in a tuple."""
    states = (x,)
    for each in decoder.layers:
        x = each(x, position_embeddings=decoder.rotary_emb(x, torch.arange(TOKENS)[None]))
        states += (x,)
    return sum(states)


@pytest.mark.parametrize("run", [keeps_first, keeps_all])
def test_a_stream_that_the_decoder_keeps_stays(run):
    def with_skip(model):
        make = torch.Generator().manual_seed(1)
        x = model.model.embed_tokens(torch.randint(0, 97, (2, TOKENS), generator=make))
        run(model.model, x.sin()).square().mean().backward()
        return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}

    with lean_model() as model:
        found = with_skip(model)
    assert_close(found, with_skip(build_model(family_config("llama")).train()))


def test_a_layers_output_that_a_hook_of_the_program_keeps_stays():
    def with_term(model):
        kept = []
        model.model.layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
        loss = model(**family_batch(TOKENS, 2), use_cache=False).loss
        (loss + kept[0].square().mean()).backward()
        return {name: param.grad for name, param in model.named_parameters()}

    with lean_model() as model:
        found = with_term(model)
    assert_close(found, with_term(build_model(family_config("llama")).train()))


def test_gradients_that_hooks_keep_stay():
    def kept_gradients(model):
        kept = []
        for each in (*model.model.layers, model.model.norm):
            each.register_full_backward_hook(lambda module, of_inputs, of_outputs: kept.append(of_outputs[0]))
        gradients(model)
        return {str(number): grad for number, grad in enumerate(kept)}

    with lean_model() as model:
        found = kept_gradients(model)
    assert_close(found, kept_gradients(build_model(family_config("llama")).train()))


def test_a_gradient_that_another_branch_needs_stays():
    """An add of views, whose backward hands one gradient's memory to both branches."""

    def flat_add(model):
        x = model.model.embed_tokens(family_batch(TOKENS, 2)["input_ids"])
        side = model.model.norm(x)
        y = model.model.layers[0](x, position_embeddings=model.model.rotary_emb(x, torch.arange(TOKENS)[None]))
        total = (y.view(-1, 32) + side.view(-1, 32)).view(x.shape)
        total.sin().square().sum().backward()
        return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}

    with lean_model() as model:
        found = flat_add(model)
    assert_close(found, flat_add(build_model(family_config("llama")).train()))


class KeepsLoss(torch.nn.Linear):
    """A projection that keeps a term of the loss for the program to add."""

    def forward(self, x):
        y = super().forward(x)
        self.aux = y.square().mean()
        return y


class ByPlace(torch.nn.Linear):
    """A projection that scales its output by the index in its input."""

    def forward(self, x):
        return super().forward(x) * torch.arange(1, x.shape[1] + 1)[:, None]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(KeepsLoss, "keeps a tensor with a graph"), (ByPlace, "depends on a token's place or the length")],
)
def test_a_layer_that_needs_all_tokens_is_ordinary(kind, reason):
    def change(model):
        for each in model.model.layers:
            each.mlp.up_proj.__class__ = kind

    with lean_model() as model:
        change(model)
        with pytest.warns(UserWarning, match=reason):
            found = gradients(model)
    assert_close(found, ordinary_gradients(change))


def test_chunks_attend_in_the_dtype_of_autocast():
    def in_bf16(model):
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model)

    with lean_model() as model:
        found = in_bf16(model)
    expected = in_bf16(build_model(family_config("llama")).train())
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 0.03 * grad.norm(), name
