"""MLPs and experts in tiles: values and gradients of the whole module, each weight's once, with two forwards."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.cells import build_model
from benchmarks.families import FAMILIES, family_config
from deepspeed_alst.config.schema import TiledMLPConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import ConfigError, UnsupportedModelError
from deepspeed_alst.tiling.experts import num_stacked_experts, run_by_expert
from deepspeed_alst.tiling.tiled_mlp import row_bytes, tile_mlps, tile_rows
from deepspeed_alst.tiling.tiled_module import TiledModule
from deepspeed_alst.tiling.token_wise import token_wise_modules
from deepspeed_alst.tiling.weight_gradients import WeightGradients
from tests.models import family_batch

EXACT = 1e-12
# MLP, MLP in the recomputation, in a tile's backward: what runs of it, in matrix products of one forward.
POST_NORM = ("olmo2", "glm4")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp(min=1e-300)).item()


def model_of(model_type: str, **changed: Any) -> torch.nn.Module:
    config = family_config(model_type, **changed)
    config._experts_implementation = "eager"  # the grouped matrix product has no fp64
    return build_model(config).double().train()


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and multiplications of a second step: the first may still learn what the recomputation needs."""
    for _ in range(2):
        model.zero_grad()
        with Products() as products:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return loss.item(), grads, products.count


def no_leaf(module: torch.nn.Module) -> None:
    pass


# --- whole models


@pytest.mark.parametrize("checkpointing", ["", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_in_tiles_is_exact_and_its_mlps_run_twice(model_type, checkpointing):
    model, batch = model_of(model_type), family_batch(37, 2)
    loss, grads, products = step(model, batch)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=10), no_leaf, undo)
        tiled_loss, tiled_grads, tiled_products = step(model, batch)
    assert tiled_loss == pytest.approx(loss, rel=EXACT)
    assert tiled_grads.keys() == grads.keys()
    assert max(error(tiled_grads[name], grad) for name, grad in grads.items()) < EXACT
    # Of a layer's 3 parts (forward and twice that in backward) the recomputation adds one at most; of an MLP it leaves
    # out the last matrix. A post-norm layer needs the MLP's value: a third forward.
    most = 1.23 if checkpointing else 1.12
    if model_type in MIXTURES:
        most = 1.30 if checkpointing else 1.23
    if model_type in POST_NORM and checkpointing:
        most = 1.39
    assert 1.0 < tiled_products / products < most
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.model.layers.modules())


@pytest.mark.parametrize("tokens", [1, 63, 1000, 4097])
@pytest.mark.parametrize("tile", [1000, 64, 5000])
def test_any_number_of_tokens_in_tiles_of_any_size(tokens, tile):
    config = CONFIG_MAPPING["llama"](hidden_size=16, intermediate_size=24, num_attention_heads=4)
    module = LlamaMLP(config).double()
    assert_same(module, tile, torch.randn(1, tokens, 16, dtype=torch.float64))


def test_more_tiles_than_tokens_and_no_token_at_all():
    module = LlamaMLP(CONFIG_MAPPING["llama"](hidden_size=16, intermediate_size=24, num_attention_heads=4)).double()
    assert_same(module, 1, torch.randn(1, 3, 16, dtype=torch.float64))
    assert_same(module, 4, torch.randn(2, 0, 16, dtype=torch.float64))


def assert_same(module: torch.nn.Module, tile: int, x: torch.Tensor, *rows: torch.Tensor) -> None:
    x.requires_grad_()
    work = TiledModule("mlp", module)
    outputs = [function(x, *rows) for function in (module, lambda *all_rows: work.run_tiled(tile, *all_rows))]
    seed = torch.randn_like(outputs[0])
    wanted = [x, *(param for param in module.parameters() if param.requires_grad)]
    whole, tiled = (torch.autograd.grad(output, wanted, seed) for output in outputs)
    assert outputs[0].shape == outputs[1].shape and error(outputs[1], outputs[0]) < EXACT
    for one, other in zip(tiled, whole, strict=True):
        assert error(one, other) < EXACT


class Odd(torch.nn.Module):
    """Biases, a frozen matrix, a shared one, and an output that no Linear makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
        self.frozen = torch.nn.Linear(16, 24).requires_grad_(False)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(self.one(x)) * self.frozen(x)
        return self.two(inner) + self.two(inner.sin())


@pytest.mark.parametrize("tile", [4, 100])
def test_a_module_of_any_shape(tile):
    torch.manual_seed(0)
    module, x = Odd().double(), torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    work = TiledModule("odd", module)
    params = [param for param in module.parameters() if param.requires_grad]
    found = []
    for function in (module, lambda rows: work.run_tiled(tile, rows)):
        output = function(x)
        assert output.shape == (2, 9, 16)
        found.append(torch.autograd.grad(output.square().sum(), [x, *params], allow_unused=True))
    for tiled, whole in zip(found[1], found[0], strict=True):
        assert (tiled is None) == (whole is None)
        assert whole is None or error(tiled, whole) < EXACT


class Doubled(torch.nn.Sequential):
    """The output of its last Linear, changed in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x)
        output *= 2
        return output


class Again(torch.nn.Sequential):
    """The output of a Linear that runs twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x).sin())


@pytest.mark.parametrize("kind", [Doubled, Again])
def test_a_last_matrix_that_does_more_than_make_the_output_has_its_gradient(kind):
    module = kind(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 16)).double()
    assert_same(module, 4, torch.randn(2, 9, 16, dtype=torch.float64))


def test_adapters_and_a_frozen_model():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], lora_dropout=0.0, init_lora_weights=False)
    model, batch = get_peft_model(model_of("llama"), config).double(), family_batch(37, 2)
    loss, grads, _ = step(model, batch)
    with PatchSet() as undo:
        assert "2 LlamaMLP" in tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=10), no_leaf, undo)
        tiled_loss, tiled_grads, _ = step(model, batch)
    assert tiled_loss == pytest.approx(loss, rel=EXACT) and tiled_grads.keys() == grads.keys()
    assert max(error(tiled_grads[name], grad) for name, grad in grads.items()) < EXACT
    assert all("lora" in name for name in grads)


# --- each weight's gradient


def test_a_weight_gets_its_gradient_once_and_its_hooks_see_the_sum():
    module, x = (
        LlamaMLP(CONFIG_MAPPING["llama"](hidden_size=16, intermediate_size=24, num_attention_heads=4)),
        torch.randn(1, 50, 16),
    )
    seen: dict[str, list[torch.Tensor]] = {}
    accumulated: list[str] = []
    for name, param in module.named_parameters():
        param.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad.clone()))
        param.register_post_accumulate_grad_hook(lambda _, name=name: accumulated.append(name))
    work = TiledModule("mlp", module)
    for _ in range(2):
        work.run_tiled(7, x.clone().requires_grad_()).sum().backward()
    names = [name for name, _ in module.named_parameters()]
    assert sorted(accumulated) == sorted(2 * names)
    for name, param in module.named_parameters():
        assert len(seen[name]) == 2
        torch.testing.assert_close(sum(seen[name]), param.grad)


def test_a_hook_that_changes_a_gradient_changes_it_once():
    module, x = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)).double(), torch.randn(20, 4).double()
    module[0].weight.register_hook(lambda grad: 3 * grad)
    module(x).sum().backward()
    expected = module[0].weight.grad.clone()
    module.zero_grad()
    TiledModule("mlp", module).run_tiled(6, x).sum().backward()
    assert error(module[0].weight.grad, expected) < EXACT


def bf16_error(num_tiles: int, fp32: bool) -> float:
    """Of the weights' gradients in bf16 tiles, against fp64."""
    torch.manual_seed(1)
    module = LlamaMLP(CONFIG_MAPPING["llama"](hidden_size=64, intermediate_size=96, num_attention_heads=4)).bfloat16()
    x, seed = torch.randn(1, 2048, 64).bfloat16(), torch.randn(1, 2048, 64).bfloat16()
    params = list(module.parameters())
    work = TiledModule("mlp", module, fp32)
    found = torch.autograd.grad(work.run_tiled(2048 // num_tiles, x.requires_grad_()), params, seed)
    truth = LlamaMLP(CONFIG_MAPPING["llama"](hidden_size=64, intermediate_size=96, num_attention_heads=4)).double()
    truth.load_state_dict({name: param.double() for name, param in module.state_dict().items()})
    exact = torch.autograd.grad(truth(x.double()), list(truth.parameters()), seed.double())
    return max(error(one.double(), other) for one, other in zip(found, exact, strict=True))


def test_the_number_of_tiles_does_not_matter_in_bf16():
    whole = bf16_error(1, True)
    assert max(bf16_error(tiles, True) for tiles in (4, 16, 64, 128)) < 1.2 * whole
    assert bf16_error(128, False) > 2 * whole, "this test would not see sums in bf16"


def test_sums_are_in_fp32_for_each_half_precision_weight():
    half, single = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4)
    sums = WeightGradients([half, single], 512, fp32=True)
    for _ in range(512):
        sums.add(half, torch.full_like(half, 0.01))
        sums.add(single, torch.full_like(single, 0.01))
    found = sums.result()
    assert [each.dtype for each in found] == [torch.bfloat16, torch.float32]
    expected = torch.full((4,), 512 * float(half.new_tensor(0.01)))
    torch.testing.assert_close(found[0].float(), expected, rtol=4e-3, atol=0)


def test_a_second_backward_and_an_exception_in_a_tile_leave_nothing_behind():
    module, x = (
        LlamaMLP(CONFIG_MAPPING["llama"](hidden_size=16, intermediate_size=24, num_attention_heads=4)),
        torch.randn(1, 50, 16),
    )
    work, weight = TiledModule("mlp", module), module.down_proj.weight
    weight.register_hook(lambda grad: grad)
    output = work.run_tiled(7, x.requires_grad_())
    module.act_fn.forward = lambda rows: (_ for _ in ()).throw(RuntimeError("in a tile"))
    with pytest.raises(RuntimeError, match="in a tile"):
        output.sum().backward(retain_graph=True)
    del module.act_fn.forward
    assert len(weight._backward_hooks) == 1 and not module.down_proj._forward_pre_hooks and weight.grad is None
    output.sum().backward(retain_graph=True)
    once = weight.grad.clone()
    output.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_autocast_is_that_of_the_forward():
    module = LlamaMLP(CONFIG_MAPPING["llama"](hidden_size=16, intermediate_size=24, num_attention_heads=4))
    x = torch.randn(1, 50, 16, requires_grad=True)
    work, found = TiledModule("mlp", module), []
    for function in (module, lambda rows: work.run_tiled(50, rows)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = function(x * 1)
        assert output.dtype == torch.bfloat16
        found.append(torch.autograd.grad(output.float().sum(), [x, *module.parameters()]))
    for tiled, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(tiled, whole)


# --- mixtures


@pytest.mark.parametrize("tile", [3, 1000])
@pytest.mark.parametrize("kind", [Qwen3MoeExperts, GptOssExperts])
def test_expert_by_expert(kind, tile):
    names = {"num_experts": 5, "num_local_experts": 5, "moe_intermediate_size": 24, "intermediate_size": 24}
    model_type = "qwen3_moe" if kind is Qwen3MoeExperts else "gpt_oss"
    config = CONFIG_MAPPING[model_type](hidden_size=16, **names)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = kind(config).double()
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.3)
    assert num_stacked_experts(module) == 5
    x, weight = (torch.randn(50, n, dtype=torch.float64, requires_grad=True) for n in (16, 2))
    index = torch.stack([torch.randperm(4)[:2] for _ in range(50)])  # the fifth has no token
    outputs = [module(x, index, weight), run_by_expert(TiledModule("experts", module), tile, x, index, weight)]
    seed = torch.randn_like(x)
    whole, split = (torch.autograd.grad(output, [x, weight, *module.parameters()], seed) for output in outputs)
    assert error(outputs[1], outputs[0]) < EXACT
    for one, other in zip(split, whole, strict=True):
        assert error(one, other) < EXACT


def test_experts_whose_sums_do_not_fit_run_one_by_one():
    model = build_model(family_config("qwen3_moe")).bfloat16().train()
    batch, calls = family_batch(200, 2), []
    sums = 4 * sum(param.numel() for param in model.model.layers[0].mlp.experts.parameters())
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_bytes=sums, min_tokens=0), no_leaf, undo)
        experts = type(model.model.layers[0].mlp.experts)
        undo.callback(setattr, experts, "forward", experts.forward)
        forward = experts.forward
        experts.forward = lambda self, x, *rest: calls.append(self.num_experts) or forward(self, x, *rest)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    whole = build_model(family_config("qwen3_moe")).bfloat16().train()
    expected = whole(**batch, use_cache=False).loss
    expected.backward()
    assert set(calls) == {1} and loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert error(one.grad.float(), other.grad.float()) < 0.05


def test_a_dense_module_whose_sums_do_not_fit_says_what_would():
    model = build_model(family_config("llama")).bfloat16().train()
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_bytes=1000, min_tokens=0), no_leaf, undo)
        with pytest.raises(
            ConfigError, match=r"tile_bytes=1000: .* needs 18432 bytes for the fp32 sums .* Use at least \d+"
        ):
            model(**family_batch(300, 2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_mixture_records_of_its_router_has_its_gradient_once(checkpointing):
    model, batch = model_of("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), family_batch(37, 2)
    loss, grads, _ = step(model, batch)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=10), no_leaf, undo)
        tiled_loss, tiled_grads, _ = step(model, batch)
    assert tiled_loss == pytest.approx(loss, rel=EXACT)
    gates = [name for name in grads if ".gate." in name]
    assert gates and max(error(tiled_grads[name], grads[name]) for name in gates) < EXACT


# --- what is tiled, and when


def test_modules_are_found_where_transformers_has_no_table():
    for model_type, count in (("stablelm", 2), ("gpt2", 2), ("falcon", 2), ("gpt_neox", 2)):
        small = {"n_layer": 2, "n_head": 4, "n_embd": 32, "hidden_size": 32, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "vocab_size": 97}
        model = build_model(CONFIG_MAPPING[model_type](**small, bos_token_id=None, eos_token_id=None))
        found = token_wise_modules(ModelSpec(model))
        assert len(found) == count and all("attn" not in name and "attention" not in name for name in found), model_type


def test_a_block_with_its_router_inside_is_not_tiled():
    # Its router's logits would be recorded tile by tile, without a gradient.
    assert not token_wise_modules(ModelSpec(build_model(family_config("jetmoe"))))


def test_experts_of_rows_sorted_by_expert_are_not_tiled_and_the_shared_one_is():
    model, batch = model_of("llama4_text", num_local_experts=4, no_rope_layers=[1, 0]), family_batch(37, 2)
    _, grads, _ = step(model, batch)
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=10), no_leaf, undo)
        _, tiled, _ = step(model, batch)
    assert list(token_wise_modules(ModelSpec(model))) == [
        f"model.layers.{i}.feed_forward.shared_expert" for i in (0, 1)
    ]
    assert max(error(tiled[name], grad) for name, grad in grads.items()) < EXACT


def test_a_model_with_nothing_to_tile_is_refused():
    config = CONFIG_MAPPING["opt"](
        hidden_size=32, num_hidden_layers=1, ffn_dim=48, num_attention_heads=4, vocab_size=97, word_embed_proj_dim=32
    )
    with PatchSet() as undo, pytest.raises(UnsupportedModelError, match="OPTForCausalLM has no MLP or experts"):
        tile_mlps(ModelSpec(build_model(config)), TiledMLPConfig(), no_leaf, undo)


@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_a_module_that_mixes_tokens_is_refused(gate):
    class Mixing(torch.nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.gate = torch.nn.Parameter(torch.full((8,), gate))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.gate * x.roll(1, dims=-2))

    module = Mixing(8, 8)
    with pytest.raises(UnsupportedModelError, match="the output of mixing for a token depends on other tokens"):
        TiledModule("mixing", module).run_tiled(5, torch.randn(1, 40, 8))
    assert torch.equal(module.gate, torch.full((8,), gate))


def test_a_4bit_layer_in_evaluation_mode_is_refused_where_gradients_are_asked_for():
    class Linear4bit(torch.nn.Linear):
        """Named as bitsandbytes names it; the refusal looks at that, the mode and the device."""

    model = build_model(family_config("llama"))
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Linear4bit(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
    rows = torch.randn(1, 40, mlp.down_proj.out_features)
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=8), lambda module: None, undo)
        mlp.eval()
        with torch.no_grad():
            mlp(rows)
        with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj is a bitsandbytes Linear4bit"):
            mlp(rows)
        mlp.train()
        assert mlp(rows).requires_grad


def test_a_dropout_in_a_tiled_module_is_refused():
    model = build_model(family_config("starcoder2", residual_dropout=0.1))
    with PatchSet() as undo, pytest.raises(UnsupportedModelError, match=r"mlp\.residual_dropout=0\.1 is a dropout"):
        tile_mlps(ModelSpec(model), TiledMLPConfig(), no_leaf, undo)


@pytest.mark.parametrize(
    ("keys", "rows", "expected"),
    [
        ({"tile_tokens": 100}, 250, 100),
        ({"tile_tokens": 100}, 63, 63),
        ({}, 2047, 2047),  # under min_tokens
        ({}, 0, 0),
        ({"min_tokens": 0}, 100_000, 2688),  # of the 2730 that fit into 2^29: 38 tiles, even and a multiple of 64
        ({"tile_bytes": 2**20 + 2**16, "min_tokens": 0}, 100_000, 256),  # the fewest
    ],
)
def test_rows_of_a_tile(keys, rows, expected):
    bytes_per_row = row_bytes(2 * 14336 + 4096, 2)
    assert bytes_per_row == 3 * 65536
    budget = TiledMLPConfig(**keys)
    assert tile_rows(budget, rows, bytes_per_row, 2**16) == expected
