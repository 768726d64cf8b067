"""A gated MLP in closed form: which modules are taken for one, and values and gradients against fp64."""

import copy
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.cells import Cell, build_model, ds_config, model_config, samples
from benchmarks.families import family_config
from benchmarks.kernels.gated import by_autograd, mlp_peak
from benchmarks.kernels.judge import errors_of
from deepspeed_alst.config.schema import TiledMLPConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.tiling import gated_mlp
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from deepspeed_alst.tiling.tiled_module import TiledModule, TiledPass
from deepspeed_alst.tiling.token_wise import token_wise_modules
from tests.models import family_batch
from tests.tiling.test_tiled_mlp import EXACT, error, no_leaf

M, INNER = 16, 24
GATED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "cohere", "helium", "smollm3"), "silu"),
    **dict.fromkeys(("stablelm", "phi3", "glm", "glm4"), "silu"),
    **dict.fromkeys(("gemma", "gemma3_text"), "gelu_tanh"),
}
NOT_GATED = ("starcoder2", "nemotron", "falcon_h1", "mixtral", "qwen3_moe")


class Mlp(torch.nn.Module):
    """``down(act(gate(x)) * up(x))``, with gate and up apart, or as halves of one matrix, either one first."""

    def __init__(self, act: Any = F.silu, layout: str = "apart", bias: bool = False) -> None:
        super().__init__()
        self.act, self.layout = act, layout
        if layout == "apart":
            self.one, self.two = torch.nn.Linear(M, INNER, bias), torch.nn.Linear(M, INNER, bias)
        else:
            self.both = torch.nn.Linear(M, 2 * INNER, bias)
        self.three = torch.nn.Linear(INNER, M, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = (self.one(x), self.two(x)) if self.layout == "apart" else self.both(x).chunk(2, dim=-1)
        gate, up = pair[::-1] if self.layout == "turned" else pair
        return self.three(self.act(gate) * up)


def form_of(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> gated_mlp.GatedMlp | None:
    return TiledModule("mlp", module).closed_form([torch.zeros(1, 3, M, dtype=dtype)], 3)


def llama_mlp(act: str) -> LlamaMLP:
    sizes = {"hidden_size": M, "intermediate_size": INNER, "num_attention_heads": 4}
    return LlamaMLP(CONFIG_MAPPING["llama"](**sizes, hidden_act=act))


# --- which modules are


@pytest.mark.parametrize("model_type", [*GATED, *NOT_GATED])
def test_the_mlps_of_a_family_are_known_by_what_they_do(model_type):
    for name, module in token_wise_modules(ModelSpec(build_model(family_config(model_type)))).items():
        form = TiledModule(name, module).closed_form([torch.zeros(1, 3, 32)], 3)
        assert (form and form.activation) == GATED.get(model_type), name
        assert form is None or len(form.gate_up) == (1 if model_type in ("phi3", "glm", "glm4") else 2)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", None),
        ("gelu_10", None),
        ("relu", None),
        ("relu2", None),
        ("mish", None),
        ("linear", None),
    ],
)
def test_an_activation_is_known_by_its_values(name, activation):
    assert ((form := form_of(llama_mlp(name))) and form.activation) == activation


@pytest.mark.parametrize("layout", ["apart", "fused", "turned"])
def test_the_order_of_gate_and_up_is_found(layout):
    module = Mlp(F.gelu, layout, bias=True)
    form = form_of(module)
    assert form.activation == "gelu" and form.down is module.three and form.up_first == (layout == "turned")
    assert form.gate_up == ((module.one, module.two) if layout == "apart" else (module.both,))


class Detaching(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(F.silu(self.one(x).detach()) * self.two(x))


class Scaled(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.0


class Normed(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(F.normalize(F.silu(self.one(x)) * self.two(x)))


class Limited(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(F.silu(self.one(x).clamp(max=100.0)) * self.two(x))


class Residual(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(F.silu(self.one(x)) * self.two(F.silu(x)))


class Own(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(F.silu(self.one(x)) * self.two(x) * self.scale)


class Buffered(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


class Twice(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(F.silu(self.one(x)) * self.one(x))


@pytest.mark.parametrize("kind", [Detaching, Scaled, Normed, Limited, Residual, Own, Buffered, Twice])
def test_what_is_more_or_other_than_a_gated_mlp_is_none(kind):
    assert form_of(Mlp()) is not None and form_of(kind()) is None


def lora(module: Mlp) -> torch.nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["three"], init_lora_weights=False), module)


def replaced(module: Mlp) -> torch.nn.Module:
    forward = module.forward
    module.forward = lambda x: forward(x)
    return module


def replaced_inside(module: Mlp) -> torch.nn.Module:
    module.one.forward = functools.partial(torch.nn.Linear.forward, module.one)
    return module


def hooked(module: Mlp, register: str) -> torch.nn.Module:
    getattr(module.two, register)(lambda *args: None)
    return module


@pytest.mark.parametrize(
    "change",
    [
        lora,
        replaced,
        replaced_inside,
        functools.partial(hooked, register="register_forward_hook"),
        functools.partial(hooked, register="register_forward_pre_hook"),
        functools.partial(hooked, register="register_full_backward_hook"),
        lambda module: torch.nn.utils.parametrizations.weight_norm(module.one) and module,
        lambda module: module.half(),
    ],
)
def test_what_a_program_hangs_on_a_module_is_run(change):
    assert form_of(change(Mlp())) is None


def test_under_autocast_and_with_a_hook_on_all_modules_it_is_run():
    work, x = TiledModule("mlp", Mlp()), [torch.zeros(1, 3, M)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert work.closed_form(x, 3) is None
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert work.closed_form(x, 3) is None
    handle.remove()
    assert work.closed_form(x, 3) is not None


def test_a_module_that_changes_is_looked_at_again():
    module, x = llama_mlp("silu"), [torch.zeros(1, 3, M)]
    work = TiledModule("mlp", module)
    with torch.inference_mode():
        assert work.closed_form(x, 3).activation == "silu"
    module.act_fn = torch.nn.GELU()
    assert work.closed_form(x, 3).activation == "gelu"
    module.act_fn = torch.nn.ReLU()
    assert work.closed_form(x, 3) is None
    module.act_fn = torch.nn.SiLU()
    assert work.closed_form(x, 3).activation == "silu"


class Elsewhere(Mlp):
    """What it adds is nothing yet, and would get no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.act(self.one(x)) * self.two(x) + SHIFT)


SHIFT = torch.nn.Parameter(torch.zeros(INNER))


def test_a_weight_that_is_not_the_modules_own_is_refused_and_not_left_out():
    work = TiledModule("mlp", Elsewhere())
    with pytest.raises(UnsupportedModelError, match=r"mlp uses a weight of shape \[24\] that is not one of its own"):
        work.run_tiled(3, torch.randn(1, 9, M)).sum().backward()


# --- values and gradients


def gradients(module: torch.nn.Module, tile: int, x: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    value = TiledModule("mlp", module).run_tiled(tile, x)
    wanted = [x, *(param for param in module.parameters() if param.requires_grad)]
    return [value.detach(), *torch.autograd.grad(value, wanted, seed)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [100, 401])
@pytest.mark.parametrize(
    ("act", "layout", "bias"),
    [
        (F.silu, "apart", False),
        (F.silu, "fused", True),
        (F.gelu, "apart", True),
        (functools.partial(F.gelu, approximate="tanh"), "turned", False),
    ],
)
def test_values_and_gradients_are_as_good_as_the_modules_own(act, layout, bias, tile, dtype):
    torch.manual_seed(0)
    module = Mlp(act, layout, bias)
    for param in module.parameters():  # gates of all sizes
        torch.nn.init.normal_(param, std=0.4)
    module = module.to(dtype)
    x, seed = torch.randn(2, 1, 401, M).to(dtype)
    with mock.patch.object(
        gated_mlp.GatedMlp, "backward", autospec=True, side_effect=gated_mlp.GatedMlp.backward
    ) as by:
        found = gradients(module, tile, x, seed)
        with by_autograd():
            same = gradients(module, tile, x, seed)
            truth = gradients(copy.deepcopy(module).double(), tile, x.double(), seed.double())
    assert by.call_count == -(-401 // tile)
    names = ("value", "x", *(name for name, _ in module.named_parameters()))
    errors = errors_of(names, found, same, truth)
    assert all(error <= most for error, most in errors.values()), errors


@pytest.mark.parametrize("tile", [7, 1000])
@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("layout", ["apart", "fused", "turned"])
def test_in_fp64_it_is_exact_in_tiles_of_any_size(layout, rows, tile):
    module, (x, seed) = Mlp(F.gelu, layout, bias=True).double(), torch.randn(2, 2, rows, M, dtype=torch.float64)
    assert form_of(module, torch.float64) is not None
    found = gradients(module, tile, x, seed)
    with by_autograd():
        expected = gradients(module, tile, x, seed)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and error(one, other) < EXACT


@pytest.mark.parametrize(
    ("frozen", "needs_x"),
    [
        (("one.weight",), True),
        (("two.bias", "three.weight"), False),
        (("one", "two"), False),
        (("three",), True),
        (("",), True),
    ],
)
def test_frozen_weights_get_no_gradient_and_the_others_theirs(frozen, needs_x):
    module, (x, seed) = Mlp(bias=True).double(), torch.randn(2, 1, 20, M, dtype=torch.float64)
    for name, param in module.named_parameters():
        param.requires_grad_(not name.startswith(frozen))
    results = []
    for run in (module, functools.partial(TiledModule("mlp", module).run_tiled, 6)):
        module.zero_grad()
        leaf = x.clone().requires_grad_(needs_x)
        run(leaf).backward(seed)
        results.append({"x": leaf.grad, **{name: param.grad for name, param in module.named_parameters()}})
    for name, expected in results[0].items():
        assert (results[1][name] is None) == (expected is None), name
        assert expected is None or error(results[1][name], expected) < EXACT, name


def test_a_shared_weight_gets_one_gradient_its_hooks_see_the_sum_and_accumulation_adds():
    module, x = Mlp().double(), torch.randn(3, 20, M, dtype=torch.float64)
    module.two.weight = module.one.weight
    module(x).sum().backward()
    module(2 * x).sum().backward()
    expected = module.one.weight.grad.clone()
    module.zero_grad()
    seen: list[torch.Tensor] = []
    module.one.weight.register_hook(lambda grad: seen.append(grad.clone()))
    work = TiledModule("mlp", module)
    for each in (x, 2 * x):
        work.run_tiled(7, each).sum().backward()
    assert len(seen) == 2 and error(sum(seen), expected) < EXACT and error(module.one.weight.grad, expected) < EXACT


# --- how often, and what it needs


def test_a_checkpointed_step_runs_it_once_forward_and_once_backward():
    model, batch = build_model(family_config("phi3")).train(), family_batch(37, 2)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_tokens=10), no_leaf, undo)
        assert rows_of_a_step(lambda: model(**batch, use_cache=False).loss.backward(), 74, 2) == (1, 1)


def rows_of_a_step(step: Any, tokens: int, num_layers: int) -> tuple[float, float]:
    """How often all tokens pass a layer's MLP in closed form in a second step, forward and backward."""
    rows = {"forward": 0, "backward": 0}

    def counting(name: str, run: Any) -> Any:
        def counted(form: Any, x_tM: torch.Tensor, *rest: Any) -> None:
            rows[name] += len(x_tM)
            run(form, x_tM, *rest)

        return counted

    step()
    with PatchSet() as undo:
        for name in rows:
            run = getattr(gated_mlp.GatedMlp, name)
            undo.enter_context(mock.patch.object(gated_mlp.GatedMlp, name, counting(name, run)))
        step()
    return rows["forward"] / tokens / num_layers, rows["backward"] / tokens / num_layers


def by_key(stage: int) -> tuple[float, float]:
    """``rows_of_a_step`` of an engine whose layers are checkpointed."""
    import deepspeed

    model = build_model(model_config(Cell())).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    config = ds_config(Cell(stage=stage), 1) | {"alst": {"tiled_mlp_compute": {"tile_tokens": 7}}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    batch = samples(Cell(), 97)[0][torch.distributed.get_rank()][0]

    def step() -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    found = rows_of_a_step(step, batch["input_ids"].numel(), len(model.model.layers))
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_runs_it_once_forward_and_once_backward(stage, ranks2):
    assert ranks2.run(by_key, stage) == [(1, 1), (1, 1)]


def test_a_tile_needs_three_values_a_row_and_inner_feature():
    rows, peak = zip(*(mlp_peak(closed=True, tile_tokens=each) for each in (8192, 16384)), strict=True)
    assert (peak[1] - peak[0]) == (rows[1] - rows[0]) * 3 * 14336 * 2
    (auto_rows, auto_peak), (plain_rows, plain_peak) = mlp_peak(closed=True), mlp_peak(closed=False)
    assert auto_rows > 2 * plain_rows and auto_peak < 1.05 * plain_peak
    assert auto_peak < 0.85 * mlp_peak(closed=False, tile_tokens=auto_rows)[1]


@pytest.mark.parametrize(("tokens", "tiles"), [(256, 0), (640, 1), (1500, 2)])
def test_more_rows_fit_and_what_would_not_fit_whole_is_one_tile(tokens, tiles):
    config = CONFIG_MAPPING["llama"](
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=97
    )
    model = build_model(config).train()
    x = torch.randn(1, tokens, 32, requires_grad=True)
    forward = gated_mlp.GatedMlp.forward
    with (
        PatchSet() as undo,
        mock.patch.object(gated_mlp.GatedMlp, "forward", autospec=True, side_effect=forward) as by_tile,
        mock.patch.object(TiledPass, "apply", side_effect=TiledPass.apply) as passes,
    ):
        # By autograd 3 * (2 * 64 + 32) fp32 values a row: 409 rows; in closed form 3 * 64: 1024.
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_bytes=1024 * 3 * 64 * 4, min_tokens=0), no_leaf, undo)
        model.model.layers[0].mlp(x).sum().backward()
    assert passes.call_count == min(tiles, 1) and by_tile.call_count == tiles
