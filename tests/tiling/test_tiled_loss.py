"""Logits and loss in tiles: loss and gradients of the whole, the head's once, and logits for whoever looks at them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cells import KeepFp64, build_model
from benchmarks.families import FAMILIES, family_config
from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.tiling.lazy_logits import LazyHead, LazyLogits
from deepspeed_alst.tiling.loss import loss_tile_rows, tiled_loss
from deepspeed_alst.tiling.tiled_loss import logits_wanted, patch_unsharded_loss, tile_loss
from tests.models import family_batch
from tests.tiling.test_tiled_mlp import EXACT, Products, error, no_leaf

TILES = TiledLossConfig(tile_tokens=13)


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], **more: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, of a loss that something is multiplied with afterwards."""
    model.zero_grad()
    with KeepFp64():
        loss = model(**batch, use_cache=False, **more).loss
        (loss * 0.37).backward()
    return loss.item(), {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def tile(model: torch.nn.Module, undo: PatchSet) -> str:
    words = tile_loss(ModelSpec(model), TILES, ForwardContext(), no_leaf, undo)
    patch_unsharded_loss(ModelSpec(model), undo)
    return words


def assert_exact(model: torch.nn.Module, batch: dict[str, torch.Tensor], **more: Any) -> None:
    loss, grads = step(model, batch, **more)
    with PatchSet() as undo:
        tile(model, undo)
        with_tiles, tiled_grads = step(model, batch, **more)
        output = model(**batch)
        with pytest.warns(UserWarning, match="outputs.logits is None in training: alst.tiled_logits_loss computes"):
            assert output.logits is None
        output.logits = 7  # a program's own
        assert output.logits == 7
    assert with_tiles == pytest.approx(loss, rel=EXACT) and tiled_grads.keys() == grads.keys()
    assert max(error(tiled_grads[name], grad) for name, grad in grads.items()) < EXACT
    assert isinstance(model(**batch).logits, torch.Tensor)


def model_of(model_type: str, core: str = "sdpa", **changed: Any) -> torch.nn.Module:
    config = family_config(model_type, **changed)
    config._experts_implementation = "eager"  # the grouped matrix product has no fp64
    return build_model(config, core=core).double().train()


# --- models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_exact(model_type, tied):
    assert_exact(model_of(model_type, tie_word_embeddings=tied), family_batch(150, 2))


def test_logits_that_are_scaled_and_capped():
    assert_exact(model_of("gemma2", "eager", final_logit_softcapping=3.0, layer_types=["full_attention"] * 2), batch())
    assert_exact(model_of("granite", logits_scaling=7.0), batch())
    assert_exact(model_of("cohere", logit_scale=0.3), batch())


def batch() -> dict[str, torch.Tensor]:
    return family_batch(150, 2)


@pytest.mark.parametrize("vocab", [1, 63, 1001])
def test_a_vocabulary_that_is_a_multiple_of_nothing(vocab):
    tokens = torch.randint(0, vocab, (2, 90), generator=torch.Generator().manual_seed(0))
    assert_exact(model_of("llama", vocab_size=vocab), {"input_ids": tokens, "labels": tokens})


def test_a_count_of_items_from_elsewhere():
    assert_exact(model_of("llama"), batch(), num_items_in_batch=torch.tensor(77))


def test_without_any_label_loss_and_gradients_are_0():
    model, tokens = model_of("llama"), batch()["input_ids"]
    with PatchSet() as undo:
        tile(model, undo)
        loss, grads = step(model, {"input_ids": tokens, "labels": torch.full_like(tokens, -100)})
    assert loss == 0 and len(grads) == len(list(model.parameters()))
    assert all(not grad.any() for grad in grads.values())


def test_an_adapter_on_a_frozen_head_and_on_the_head_itself():
    from peft import LoraConfig, get_peft_model

    for targets in (["q_proj"], ["q_proj", "lm_head"]):
        config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
        model = get_peft_model(model_of("llama"), config).double()
        assert_exact(model, batch())


def test_a_head_with_a_bias():
    model = model_of("llama")
    model.lm_head = torch.nn.Linear(32, 97, bias=True).double()
    assert_exact(model, batch())


def test_a_model_without_a_head_is_refused():
    with PatchSet() as undo, pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings"):
        tile_loss(ModelSpec(model_of("llama").model), TILES, ForwardContext(), no_leaf, undo)


# --- the function


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("rows", [1, 63, 1000, 4097])
@pytest.mark.parametrize("tile_rows", [64, 1000, 5000])
def test_any_number_of_rows(rows, tile_rows, smoothing):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(37, 8, dtype=torch.float64))
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 37, (rows,))
    labels[::3] = -100
    whole = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum", label_smoothing=smoothing) / 2
    tiled = tiled_loss(lambda x: x @ weight.t(), [weight], hidden, labels, torch.tensor(0.5), tile_rows, smoothing)
    assert error(tiled, whole) < EXACT or whole == 0
    for one, other in zip(*(torch.autograd.grad(3 * each, [hidden, weight]) for each in (tiled, whole)), strict=True):
        assert error(one, other) < EXACT


@pytest.mark.parametrize("rows, tile_rows", [(16, 1000), (16, 5)])
def test_gradients_of_tensors_with_permuted_strides(rows, tile_rows):
    weight = torch.nn.Parameter(torch.randn(8, 37, dtype=torch.float64).t())
    hidden = torch.randn(8, rows, dtype=torch.float64).t().requires_grad_()
    labels = torch.randint(0, 37, (rows,))
    whole = F.cross_entropy(hidden @ weight.t(), labels)
    tiled = tiled_loss(lambda x: x @ weight.t(), [weight], hidden, labels, torch.tensor(1 / rows), tile_rows)
    for one, other in zip(*(torch.autograd.grad(each, [hidden, weight]) for each in (tiled, whole)), strict=True):
        assert error(one, other) < 1e-6  # of the divisor in fp32


def test_rows_without_a_label_are_left_out_before_the_matrix_product():
    weight, hidden = torch.nn.Parameter(torch.randn(50, 8)), torch.randn(1000, 8, requires_grad=True)
    labels = torch.zeros(1000, dtype=torch.long)
    labels[300:] = -100
    with Products() as products:
        tiled_loss(lambda x: x @ weight.t(), [weight], hidden, labels, torch.tensor(1.0), 100).backward()
    assert products.count == 3 * 300 * 8 * 50  # once for the logits, twice for the gradients


def test_the_heads_gradient_in_bf16_is_as_good_as_that_of_the_whole():
    torch.manual_seed(0)
    weight, hidden = torch.nn.Parameter(torch.randn(501, 64).bfloat16() / 8), torch.randn(4096, 64).bfloat16()
    labels = torch.randint(0, 501, (4096,))
    exact, head = weight.detach().double().requires_grad_(), hidden.double()
    F.cross_entropy(head @ exact.t(), labels, reduction="sum").div(4096 / 3).backward()
    errors = []
    for rows in (4096, 1024, 64):
        weight.grad = None
        (3 * tiled_loss(lambda x: x @ weight.t(), [weight], hidden, labels, torch.tensor(1 / 4096), rows)).backward()
        errors.append(error(weight.grad.double(), exact.grad))
    weight.grad = None
    (F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum") * (3 / 4096)).backward()
    assert max(errors) < 1.5 * error(weight.grad.double(), exact.grad)


def test_the_heads_hooks_see_one_gradient():
    weight, hidden, seen = torch.nn.Parameter(torch.randn(50, 8)), torch.randn(300, 8), []
    weight.register_hook(seen.append)
    tiled_loss(lambda x: x @ weight.t(), [weight], hidden, torch.arange(300) % 50, torch.tensor(1.0), 64).mul(
        0.5
    ).backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], weight.grad)


def test_a_tile_has_the_rows_that_its_bytes_allow():
    assert loss_tile_rows(TiledLossConfig(), 128256) == 523
    assert loss_tile_rows(TiledLossConfig(tile_bytes=1), 128256) == 64


# --- whoever looks at the logits


def test_an_evaluation_gets_logits_at_the_first_touch():
    model, tokens = model_of("granite", logits_scaling=7.0).eval(), batch()["input_ids"]
    expected = model(input_ids=tokens).logits
    with PatchSet() as undo, torch.no_grad():
        tile(model, undo)
        logits = model(input_ids=tokens, labels=tokens).logits
        assert isinstance(logits, LazyLogits) and logits.shape == expected.shape == logits.size()
        assert (logits.dim(), logits.size(-1), logits.device) == (3, 97, expected.device) and logits._value is None
        torch.testing.assert_close(logits.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(torch.softmax(logits, -1), expected.softmax(-1))
        torch.testing.assert_close(logits[:, -1] + 1, expected[:, -1] + 1)
        torch.testing.assert_close((2 * logits / 3 - 1).float().cpu(), (2 * expected / 3 - 1).float())
        torch.testing.assert_close(logits * torch.ones(97, dtype=torch.float64), expected)
        with logits_wanted(model, True):
            torch.testing.assert_close(model(input_ids=tokens, labels=tokens).logits, expected)
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)


def test_a_forward_that_fails_leaves_the_head_as_it_was():
    model = model_of("llama")
    with PatchSet() as undo:
        tile(model, undo)
        undo.hook(model.model, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch())
        assert type(model.lm_head(torch.randn(1, 3, model.config.hidden_size).double())) is torch.Tensor


def test_logits_times_a_weight_are_made_at_once_so_that_it_gets_its_gradient():
    linear, hidden = torch.nn.Linear(8, 5), torch.randn(2, 3, 8)
    logits = LazyLogits(LazyHead(linear, linear.forward, TILES), hidden)
    assert isinstance(logits * torch.tensor(2.0), LazyLogits)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    (logits * scale).sum().backward()
    torch.testing.assert_close(scale.grad, linear(hidden).sum())


def test_generation_between_steps():
    model, tokens = model_of("llama"), batch()["input_ids"][:, :7]
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)
    with PatchSet() as undo:
        tile(model, undo)
        step(model, batch())
        assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), expected)
