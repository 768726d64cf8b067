"""Attention that runs forward once a step: every gradient is, bit by bit, that of the step in which it runs twice.

*Run here*: sdpa's flash kernel of the CPU. *Stand-in*: flash attention 2 as registered operators with the real
signatures (tests/stand_ins/operators.py), which computes its backward from the output and the log-sum-exp it is given.
"""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.cells import build_model
from benchmarks.families import family_config
from benchmarks.tally import Tally
from deepspeed_alst.attention.attention_cache import CheckpointFrame, attend_cached, saving_frame
from deepspeed_alst.attention.hf_one_rank import cache_attention, check_attention_can_be_saved
from deepspeed_alst.attention.ulysses import ulysses_attention
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import ShardingConfig, shard_batch
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.profiler.fake import fake_world
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.sequence_parallel.feature import patch_model
from tests import stand_ins
from tests.attention.test_cores import DOCUMENTS, packed_batch
from tests.models import family_batch
from tests.stand_ins import operators

CPU_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
GQA = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
LAYERS = 2


class Runs(TorchDispatchMode):
    """Counts attention's forward operators."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.forwards = 0
        self._names = names or (CPU_FLASH, "_flash_attn_forward", "_flash_attn_varlen_forward")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forwards += func._schema.name.endswith(self._names)
        return func(*args, **(kwargs or {}))


def checkpoint_layers(
    model: torch.nn.Module, keeps: bool, reentrant: bool, tally: Tally | None = None, **frame: Any
) -> list[CheckpointFrame]:
    """Checkpoint the layers in frames, which are added to the list that this returns."""
    frames: list[CheckpointFrame] = []

    def in_frame(function: Any, *args: Any) -> Any:
        mine = CheckpointFrame(saves_attention=keeps, **frame)
        frames.append(mine)

        def run(*args: Any) -> Any:
            phase = tally.phase("recomputation" if mine.recomputing else "forward") if tally else nullcontext()
            with phase, mine.running():
                return function(*args)

        return checkpoint(run, *args, use_reentrant=reentrant)

    for layer in model.modules():
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, in_frame
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    return frames


def small_model(core: str = "sdpa", dtype: torch.dtype = torch.float32, **changed: Any) -> torch.nn.Module:
    model = build_model(family_config(changed.pop("family", "llama"), **{**GQA, **changed}), core="sdpa").to(dtype)
    model.config._attn_implementation = core
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return (
        bool(first)
        and first.keys() == second.keys()
        and all(torch.equal(x, second[name]) and x.isfinite().all() for name, x in first.items())
    )


def pair(
    model: torch.nn.Module, step: Any, reentrant: bool = False, **frame: Any
) -> tuple[Any, Any, list[CheckpointFrame]]:
    """``step(model)``'s gradients and attention forwards, without and with kept attention, and the frames of the last.

    Each starts from the same weights and no gradients.
    """
    found = []
    for keeps in (False, True):
        own = copy.deepcopy(model)
        with PatchSet() as undo:
            if keeps:
                cache_attention(own, undo)
            frames = checkpoint_layers(own, keeps, reentrant, **(frame if keeps else {}))
            with Runs() as runs:
                step(own)
        found.append((gradients(own), runs.forwards))
    return found[0], found[1], frames


def two_micro_steps(model: torch.nn.Module) -> None:
    for seed in (3, 4):
        model(**family_batch(37, 2, seed), use_cache=False).loss.backward()


# --- without sequence parallelism


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_the_same_bits_and_attention_runs_once(dtype, reentrant):
    """Run here: two micro steps, 2 kv heads for 6, 37 tokens."""
    (plain, twice), (kept, once), frames = pair(small_model(dtype=dtype), two_micro_steps, reentrant)
    assert same(plain, kept)
    assert (twice, once) == (2 * 2 * LAYERS, 2 * LAYERS)
    assert [frame.saved_attention for frame in frames] == [[CPU_FLASH]] * 2 * LAYERS
    assert not any(frame.recomputed_attention for frame in frames)


def test_a_padding_mask_is_transformers_own():
    """Run here. Under the private name the mask function is the one of the name that is read."""
    batch = family_batch(37, 2)
    batch["attention_mask"] = torch.ones(2, 37, dtype=torch.long)
    batch["attention_mask"][1, :11] = 0
    (plain, twice), (kept, once), _ = pair(small_model(), lambda m: m(**batch, use_cache=False).loss.backward())
    assert same(plain, kept) and (twice, once) == (2 * LAYERS, LAYERS)


def test_what_waits_elsewhere_is_contiguous_and_comes_back_in_its_strides():
    """Run here. A store on the host need know nothing of strides, and may give back memory of its own each time."""
    put = []

    def store(tensor):
        assert tensor.is_contiguous() and not tensor.requires_grad
        put.append(tensor.clone())
        return put[-1].clone

    (plain, _), (kept, _), _ = pair(small_model(), two_micro_steps, put=store)
    assert same(plain, kept)
    assert [x.numel() for x in put] == [2 * 37 * 6 * 8, 2 * 37 * 6] * 2 * LAYERS, "output and log-sum-exp, no more"


def test_the_math_backend_is_not_kept_and_says_so():
    """Run here: nothing is kept, gradients are those of the plain run."""

    def step(model):
        with sdpa_kernel(SDPBackend.MATH):
            two_micro_steps(model)

    (plain, _), (kept, _), frames = pair(small_model(), step)
    assert same(plain, kept)
    for frame in frames:
        assert frame.saved_attention == [] and "math backend" in frame.recomputed_attention[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_in_attention_is_not_kept(reentrant):
    """Run here: what is drawn behind attention is the same in the recomputation only if attention draws as well."""

    def step(model):
        torch.manual_seed(5)
        two_micro_steps(model)

    (plain, _), (kept, _), frames = pair(small_model(attention_dropout=0.1), step, reentrant)
    assert same(plain, kept) and all(frame.recomputed_attention for frame in frames)


def test_an_operator_with_dropout_is_not_kept():
    """Stand-in, whose operator is only called with dropout here."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    arguments = (0.1, 1.0, True, -1, -1, 0.0, None, False)
    frame = CheckpointFrame(saves_attention=True)
    with Runs() as runs:
        for _ in range(2):
            with frame.running():
                attend_cached(frame, lambda: torch.ops.stand_in_of_flash_attn._flash_attn_forward(q, k, v, *arguments))
    assert runs.forwards == 2
    assert frame.recomputed_attention == ["stand_in_of_flash_attn::_flash_attn_forward with dropout"]


GPU_OPERATORS = {
    "_scaled_dot_product_flash_attention": (),
    "_scaled_dot_product_efficient_attention": (None, False),
    "_scaled_dot_product_cudnn_attention": (None, False),
}


@pytest.mark.parametrize("operator", GPU_OPERATORS)
def test_the_operators_of_a_gpu_are_kept_with_their_log_sum_exp_and_seeds(operator):
    """Shapes only, on tensors without data: the forward without gradients, as a reentrant checkpoint runs it."""
    q, k, v = (torch.empty(2, 6, 37, 8, device="meta", requires_grad=True) for _ in range(3))
    run = getattr(torch.ops.aten, operator)
    frame, results = CheckpointFrame(saves_attention=True), []
    for runs_forward in (True, False, False):
        with Runs(operator) as runs, frame.running(), torch.set_grad_enabled(not runs_forward):
            results.append(attend_cached(frame, lambda: run(q, k, v, *GPU_OPERATORS[operator], is_causal=True)))
        assert runs.forwards == runs_forward
    described = [
        [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in result] for result in results
    ]
    assert described[0] == described[1] == described[2] and results[0][1].numel() >= 2 * 6 * 37
    torch.autograd.grad(results[2][0].sum(), (q, k, v))
    assert frame.saved_attention == [f"aten::{operator}"]


FROZEN = {
    "q and v": ("q_proj", "v_proj"),
    "all of attention": ("self_attn",),
    "all but the last layer's mlp": ("self_attn", "layers.0.", "embed", "norm", "lm_head"),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts(frozen, reentrant):
    """Run here."""
    model = small_model()
    for name, param in model.named_parameters():
        param.requires_grad_(not any(part in name for part in FROZEN[frozen]))
    (plain, _), (kept, _), _ = pair(model, two_micro_steps, reentrant)
    assert same(plain, kept)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_backwards_of_one_forward(reentrant):
    """Run here: the second recomputation takes the same again."""

    def step(model):
        loss = model(**family_batch(37, 2), use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()

    (plain, thrice), (kept, once), _ = pair(small_model(), step, reentrant)
    assert same(plain, kept) and (thrice, once) == (3 * LAYERS, LAYERS)


def test_evaluation_in_between_and_a_step_after_an_exception():
    """Run here."""

    def step(model):
        loss = model(**family_batch(37, 2), use_cache=False).loss
        with torch.no_grad():
            model(**family_batch(21, 1), use_cache=False)
        model.eval()(**family_batch(21, 1))
        model.train()
        loss.backward()
        layer = model.model.layers[1].mlp
        handle = layer.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**family_batch(37, 2), use_cache=False)
        handle.remove()
        model(**family_batch(37, 2, 4), use_cache=False).loss.backward()

    (plain, _), (kept, _), _ = pair(small_model(), step)
    assert same(plain, kept)


@pytest.mark.parametrize("core", ["eager", "flex_attention"])
def test_an_attention_without_operators_is_refused_with_the_way_out(core):
    model = small_model(core)
    for refuse in (check_attention_can_be_saved, lambda model: cache_attention(model, PatchSet())):
        with pytest.raises(UnsupportedModelError, match=f"'{core}'.*own attn_implementation='sdpa'"):
            refuse(model)


def test_a_function_that_somebody_registered_is_refused():
    own = AttentionInterface._global_mapping["sdpa"]
    try:
        AttentionInterface.register("sdpa", lambda *args, **kwargs: None)
        with pytest.raises(UnsupportedModelError, match="transformers' own attn_implementation='sdpa'"):
            check_attention_can_be_saved(small_model())
    finally:
        AttentionInterface.register("sdpa", own)


def test_all_of_it_is_undone_and_no_other_model_sees_it():
    """Run here: two models of one config object, one of them kept."""
    config = family_config("llama", **GQA)
    model, other = build_model(config), build_model(config)
    other.config = model.config
    before = [dict(each._global_mapping) for each in (AttentionInterface, AttentionMaskInterface)]
    with PatchSet() as undo:
        cache_attention(model, undo)
        assert model.config is not config and type(other.config._attn_implementation) is str
        assert model.config._attn_implementation == "sdpa"
    assert [dict(each._global_mapping) for each in (AttentionInterface, AttentionMaskInterface)] == before
    assert model.config is other.config and type(model.config._attn_implementation) is str


def test_the_ledger_counts_no_forward_that_does_not_run():
    """Fake tensors, FLOPs by torch's formulas."""
    flops = []
    for keeps in (False, True):
        with fake_world(1), PatchSet() as undo:
            model = build_model(family_config("llama", **GQA))
            if keeps:
                cache_attention(model, undo)
            checkpoint_layers(model, keeps, reentrant=False)
            ids = torch.zeros(1, 64, dtype=torch.long)
            with Ledger(model) as ledger:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        flops.append(ledger.flops)
    forward = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert flops[0][forward] == 2 * flops[1][forward] > 0
    assert flops[0][forward + "_backward"] == flops[1][forward + "_backward"] > 0


# --- flash attention


def flash_model(head_dim: int = 8, **changed: Any) -> torch.nn.Module:
    return small_model("flash_attention_2", family="mistral", head_dim=head_dim, **changed)


def flash_batch(packed: bool) -> dict[str, torch.Tensor]:
    return packed_batch(DOCUMENTS) if packed else family_batch(29, 1)


@pytest.mark.parametrize("head_dim", [8, 12])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_is_kept_with_windows_and_documents(packed, window, head_dim):
    """Stand-in."""
    model = flash_model(head_dim, sliding_window=window)
    batch = flash_batch(packed)
    with stand_ins.installed(), operators.registered():
        (plain, twice), (kept, once), frames = pair(model, lambda m: m(**batch, use_cache=False).loss.backward())
    assert same(plain, kept) and (twice, once) == (2 * LAYERS, LAYERS)
    assert "varlen" in frames[0].saved_attention[0] or not packed


def test_a_kernel_that_is_no_operator_is_not_kept_and_says_so():
    """Stand-in, called as flash attention 4 is: without an operator."""
    with stand_ins.installed():
        step = lambda m: m(**family_batch(29, 1), use_cache=False).loss.backward()  # noqa: E731
        (plain, _), (kept, _), frames = pair(flash_model(), step)
    assert same(plain, kept) and all(frame.recomputed_attention and not frame.saved_attention for frame in frames)


def test_the_stand_ins_backward_is_that_of_autograd():
    """Of the two stand-ins of flash attention 2, in fp64: one has its backward by autograd, the other from outputs."""
    found = []
    for registered in (operators.registered, nullcontext):
        with stand_ins.installed(), registered():
            model = flash_model(sliding_window=5).double()
            model(**packed_batch(DOCUMENTS), use_cache=False).loss.backward()
        found.append(gradients(model))
    assert all(torch.allclose(x, found[1][name], rtol=1e-6, atol=1e-9) for name, x in found[0].items())


# --- under sequence parallelism


def split_pair(setting: dict[str, Any]) -> dict[str, Any]:
    """The same over all ranks: gradients, attention forwards and all-to-alls, per layer and micro step."""
    setting = dict(setting)
    core, reentrant = setting.pop("core", "sdpa"), setting.pop("reentrant", False)
    packed, twice = setting.pop("packed", False), setting.pop("twice", False)
    frozen = setting.pop("frozen", ())
    with stand_ins.installed(), operators.registered():
        model = small_model(core, setting.pop("dtype", torch.float32), **setting)
        for name, param in model.named_parameters():
            param.requires_grad_(not any(part in name for part in frozen))
        batches = [packed_batch(DOCUMENTS, seed) if packed else family_batch(37, 2, seed) for seed in (3, 4)]
        P = dist.get_world_size()
        shards = [shard_batch(batch, P, ShardingConfig(P, packed)) for batch in batches]
        batches = [{**each.shards[dist.get_rank()], **each.common} for each in shards]
        found: dict[str, Any] = {"gradients": []}
        for keeps in (False, True):
            own, tally = copy.deepcopy(model), Tally()
            with PatchSet() as undo, tally.installed(), Runs() as runs:
                patch_model(ModelSpec(own), None, undo, ForwardContext(saving_frame=saving_frame))
                frames = checkpoint_layers(own, keeps, reentrant, tally)
                for batch in batches:
                    loss = own(**batch, use_cache=False).loss
                    with torch.no_grad():
                        own.eval()(**batch, use_cache=False)
                    own.train()
                    with tally.phase("backward"):
                        if twice:
                            loss.backward(retain_graph=True)
                        loss.backward()
            found["gradients"].append(gradients(own))
            calls = {
                phase: sum(each.name == "all_to_all_single" for each in tally.of(phase)) / LAYERS / len(batches)
                for phase in ("forward", "recomputation", "backward")
            }
            # Evaluation runs attention once more.
            found[keeps] = (runs.forwards / LAYERS / len(batches) - 1, *calls.values())
            found["kept"] = [frame.saved_attention for frame in frames]
    found["same"] = same(*found.pop("gradients"))
    return found


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"reentrant": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "reentrant": True},
        {"num_key_value_heads": 1},
        {"core": "flash_attention_2", "family": "mistral", "sliding_window": 5},
        {"core": "flash_attention_2", "family": "mistral", "sliding_window": 5, "packed": True, "reentrant": True},
        {"core": "flash_attention_2", "family": "mistral", "packed": True},
        {"frozen": ("q_proj", "v_proj")},
        {"frozen": ("k_proj", "v_proj", "embed", "layers.0.", "layers.1.input"), "reentrant": True},
    ],
    ids=str,
)
def test_under_sequence_parallelism_the_recomputation_sends_no_output(setting, ranks2):
    """sdpa: run here. Flash attention: stand-in. Forwards of attention, and all-to-alls of each pass."""
    for found in ranks2.run(split_pair, setting):
        assert found["same"] and all(found["kept"])
        if "frozen" not in setting:  # where nothing trains below, there is no recomputation or backward
            assert found[False] == (2, 2, 2, 2)
            assert found[True] == (1, 2, 1, 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_backwards_under_sequence_parallelism(reentrant, ranks2):
    """Run here."""
    for found in ranks2.run(split_pair, {"twice": True, "reentrant": reentrant}):
        assert found["same"]
        assert found[False] == (3, 2, 4, 4) and found[True] == (1, 2, 2, 4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_where_nothing_of_attention_trains(reentrant, ranks2):
    """Run here: its output alone is taken, and no gradient comes to it."""
    setting = {"frozen": ("self_attn", "embed", "layers.0.", "layernorm"), "reentrant": reentrant}
    for found in ranks2.run(split_pair, setting):
        assert found["same"]


def test_padded_heads_are_kept_as_the_operator_has_them(ranks2):
    """Stand-in: heads of 12, which the kernel pads to 16; the output is sent again, and not made again."""
    setting = {"core": "flash_attention_2", "family": "mistral", "head_dim": 12}
    for found in ranks2.run(split_pair, setting):
        assert found["same"] and found[True] == (1, 2, 2, 2)


def bytes_of_the_output(reentrant: bool) -> tuple[list[int], bool]:
    """Of attention's output in head layout: in the forward, after the recomputation, after the backward."""
    make = torch.Generator().manual_seed(dist.get_rank())
    q, k, v = (torch.randn(2, heads, 8, 16, generator=make, requires_grad=True) for heads in (4, 2, 2))
    weight = torch.randn(2, 8, 4, 16, generator=make)
    outputs = []

    def core(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outputs.append(out)
        return out

    frame = CheckpointFrame(saves_attention=True)
    with frame.running(), torch.no_grad() if reentrant else nullcontext():
        ulysses_attention(q, k, v, None, core, frame)
    with frame.running():
        again = ulysses_attention(q, k, v, None, core, frame)
    found = [out.untyped_storage().nbytes() for out in outputs]
    loss = (again * weight).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    found.append(outputs[1].untyped_storage().nbytes())
    plain = torch.autograd.grad((ulysses_attention(q, k, v, None, core) * weight).sum(), (q, k, v))
    filled = torch.equal(outputs[0], outputs[1]) and outputs[0].stride() == outputs[1].stride()
    return found, filled and all(torch.equal(x, y) for x, y in zip(grads, plain, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_output_in_head_layout_has_no_memory_until_the_backward_fills_it(reentrant, ranks2):
    """Run here."""
    for found, is_right in ranks2.run(bytes_of_the_output, reentrant):
        whole = 2 * 2 * 16 * 16 * 4
        assert found == [whole, 0, whole] and is_right


def flex_is_not_kept() -> list[str]:
    with PatchSet() as undo:
        model = small_model("flex_attention")
        patch_model(ModelSpec(model), None, undo, ForwardContext(saving_frame=saving_frame))
        frames = checkpoint_layers(model, keeps=True, reentrant=False)
        with pytest.raises(UnsupportedModelError, match="cannot train on CPU"):
            model(**shard_batch(family_batch(16, 1), 2, ShardingConfig(2)).shards[dist.get_rank()])
        return frames[0].recomputed_attention


def test_a_compiled_attention_meets_no_mode(ranks2):
    """Refused here for want of a backward, behind the frame."""
    assert ranks2.run(flex_is_not_kept) == [["flex_attention"]] * 2
