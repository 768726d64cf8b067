"""The cross-entropy kernel, run by Triton's interpreter on CPU in a process of its own; nothing here ran on a GPU.

Not shown here: races between threads, and how a GPU rounds exp and log.
"""

import copy
import os
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cells import build_model
from benchmarks.families import family_config
from benchmarks.grid import kernel_cells
from benchmarks.kernels.__main__ import layer_peak
from benchmarks.kernels.cross_entropy import Case, in_a_model, judge, tile_peak
from benchmarks.kernels.interpreter import OutOfBoundsError, faithful, round_to_bf16
from benchmarks.kernels.judge import Interpreted, measure
from benchmarks.parity import measure as measure_cell
from benchmarks.ranks import interpreted_ranks as started_interpreted
from benchmarks.tiles.systems import NORMS_AND_ROPE
from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import DataError, SetupError
from deepspeed_alst.tiling.loss import LogitTransform, fuse_ops, loss_tile_rows, tiled_loss
from deepspeed_alst.tiling.tiled_loss import tile_loss
from tests.models import family_batch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = ({}, {"label_smoothing": 0.1}, {"softcap": 2.0, "logit_scale": 0.7}, {"logit_scale": -1.3})


@pytest.fixture(scope="module")
def interpreted():
    process = Interpreted()
    yield process
    process.close()


# --- against fp64, by the error of torch in the same dtype


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "V", "gap"), [(40, 3, 0), (17, 63, 5), (11, 1000, 0), (3, 9001, 7)])
def test_loss_and_gradient_are_as_good_as_torchs(interpreted, t, V, gap, dtype, options):
    verdict = interpreted.run(judge, Case(t, V, dtype, gap=gap, **options))
    assert verdict.is_accurate, verdict.errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [63, 50257, 151665])
def test_the_bytes_that_a_launch_moves_are_at_most_1_1_times_the_least(interpreted, V, dtype):
    verdict = interpreted.run(judge, Case(2 if V > 1000 else 9, V, dtype, label_smoothing=0.1, softcap=30.0))
    assert verdict.is_lean and verdict.is_accurate, verdict


def test_the_yardstick_sees_a_gradient_that_is_off_by_a_percent():
    truth = F.softmax(torch.randn(30, 100, dtype=torch.float64), 1)
    found = measure(1.01 * truth.float(), truth.float(), truth)
    assert all(error > most for error, most in found.values())


# --- what is at the edges


def _edges(within=faithful) -> None:
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_

    scale = torch.tensor(1.0)
    with within() as traffic:
        assert cross_entropy_(torch.randn(0, 5), torch.zeros(0, dtype=torch.long), scale) == 0
        assert traffic is None or traffic.read == traffic.written == 0
        one_t1 = torch.randn(3, 1)  # a vocabulary of one: nothing to learn
        assert cross_entropy_(one_t1, torch.zeros(3, dtype=torch.long), scale) == 0 and not one_t1.any()
        unlabelled_tV = torch.full((2, 9), torch.nan)
        assert cross_entropy_(unlabelled_tV, torch.tensor([-100, -100]), scale) == 0 and not unlabelled_tV.any()
        # A vocabulary whose padding is masked, by more than a block.
        masked_tV = torch.full((2, 20000), -torch.inf)
        masked_tV[:, 9000:9003] = torch.tensor([1.0, 2.0, 3.0])
        expected = F.cross_entropy(masked_tV, torch.tensor([9001, 9002]), reduction="sum")
        torch.testing.assert_close(cross_entropy_(masked_tV, torch.tensor([9001, 9002]), scale), expected)
        assert torch.isfinite(masked_tV).all() and masked_tV.count_nonzero() == 6
        bad_tV = torch.randn(2, 9)
        bad_tV[0, 3] = torch.nan
        assert cross_entropy_(bad_tV, torch.tensor([1, 1]), scale).isnan()
        assert bad_tV[0].isnan().all() and torch.isfinite(bad_tV[1]).all()


def test_empty_tiles_one_token_unlabelled_rows_masked_and_broken_logits(interpreted):
    interpreted.run(_edges)


def _labels_out_of_range(within=faithful) -> None:
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_

    for dtype in DTYPES:
        logits_tV = torch.randn(5, 97).to(dtype)
        with within():  # the interpreter stops at a read beyond the tensor
            loss = cross_entropy_(logits_tV, torch.tensor([96, 97, -1, -(2**40), 2**40]), torch.tensor(1.0))
        assert loss.isnan() and logits_tV[1:].isnan().all() and torch.isfinite(logits_tV[0]).all()


def test_a_label_that_is_no_token_poisons_its_row_and_reads_nothing_beside_it(interpreted):
    interpreted.run(_labels_out_of_range)


def _refused_in_a_loss(label: int) -> None:
    weight, hidden = torch.nn.Parameter(torch.randn(50, 8)), torch.randn(20, 8)
    labels = torch.arange(20)
    labels[7], labels[9] = label, -100
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            tiled_loss(lambda x: x @ weight.t(), [weight], hidden, labels, torch.tensor(1.0), 4, 0.0, LogitTransform())


@pytest.mark.parametrize("label", [50, -1, -101, 2**40])
def test_a_label_that_is_no_token_is_an_error_in_a_loss(interpreted, label):
    with pytest.raises(DataError, match=rf"label {label} is outside the vocabulary of 50 tokens"):
        interpreted.run(_refused_in_a_loss, label)


def _rows_beyond_int32() -> None:
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_, cross_entropy_reference

    torch.manual_seed(0)
    # Memory that nothing touches is not taken: three rows, the last of them 2**31 + 16 elements in.
    far_tV = torch.empty(2**31 + 100, dtype=torch.bfloat16).as_strided((3, 40), (2**30 + 8, 1))
    far_tV.copy_(torch.randn(3, 40))
    near_tV, labels_t, scale = far_tV.clone(), torch.tensor([1, 2, 3]), torch.tensor(0.5)
    with faithful():
        loss = cross_entropy_(far_tV, labels_t, scale)
    torch.testing.assert_close(loss, cross_entropy_reference(near_tV, labels_t, scale))
    torch.testing.assert_close(far_tV, near_tV)


def test_rows_may_begin_beyond_2_to_the_31_elements(interpreted):
    interpreted.run(_rows_beyond_int32)


def _opcheck() -> None:
    from deepspeed_alst.kernels.registry import OPS

    for label_smoothing, softcap in ((0.0, 0.0), (0.1, 30.0)):
        arguments = (
            torch.randn(3, 40),
            torch.tensor([1, -100, 3]),
            torch.tensor(0.5),
            label_smoothing,
            softcap,
            1.0,
            True,
        )
        torch.library.opcheck(OPS["cross_entropy"].op, arguments)


def test_the_op_tells_torch_the_truth_about_its_schema_and_its_fake(interpreted):
    interpreted.run(_opcheck)


# --- in a tiled loss


def _kept_by_the_graph() -> None:
    from deepspeed_alst.kernels.registry import runs_on

    assert runs_on(torch.device("cpu"))
    torch.manual_seed(0)
    weight, hidden = torch.nn.Parameter(torch.randn(50, 8)), torch.randn(30, 8)
    grads = []
    for kernel in (None, LogitTransform()):
        weight.grad = None
        loss = tiled_loss(
            lambda x: torch.tanh(x @ weight.t()), [weight], hidden, torch.arange(30), torch.tensor(0.1), 7, 0.1, kernel
        )
        (3 * loss).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)
    try:  # here the graph's own check finds it
        tiled_loss(
            lambda x: torch.tanh(x @ weight.t()).view(-1, 50),
            [weight],
            hidden,
            torch.arange(30),
            torch.tensor(0.1),
            7,
            0.0,
            LogitTransform(),
        )
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        raise AssertionError("logits that the backward needs were overwritten")


def test_logits_that_the_backward_needs_are_not_overwritten(interpreted):
    interpreted.run(_kept_by_the_graph)


def _model(model_type: str, **changed) -> torch.nn.Module:
    config = family_config(model_type, layer_types=["full_attention"] * 2, **changed)
    return build_model(config, core="eager" if model_type == "gemma2" else "sdpa").train()


def _errors_in_a_model(model_type: str, dtype: torch.dtype, changed: dict) -> dict[str, float]:
    """Relative errors of loss and gradients against fp64, by the worst parameter: whole loss, tiles, kernel."""
    model, batch = _model(model_type, **changed), family_batch(24, 2)
    results = {}
    for name, of_dtype in (("truth", torch.float64), ("torch", dtype), ("triton", dtype)):
        copied = copy.deepcopy(model).to(of_dtype)
        with PatchSet() as undo, faithful() as traffic:
            results[name] = in_a_model(copied, batch, "torch" if name == "truth" else name, undo)
            assert (traffic.written > 0) == (name == "triton"), "the kernel did not run, or ran where it should not"
    truth_loss, truth = results["truth"]
    errors = {}
    for name in ("torch", "triton"):
        loss, grads = results[name]
        relative = [((grads[each] - truth[each]).norm() / truth[each].norm()).item() for each in truth]
        errors[name] = max(relative)
        errors[f"{name} loss"] = abs(loss.double() - truth_loss).item() / truth_loss.item()
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.3}),
    ],
)
def test_a_model_trains_as_with_torchs_tiles(interpreted, model_type, changed, dtype):
    errors = interpreted.run(_errors_in_a_model, model_type, dtype, changed)
    eps = torch.finfo(dtype).eps
    assert errors["triton"] <= 1.5 * errors["torch"] + eps / 2, errors
    assert errors["triton loss"] <= 3 * errors["torch loss"] + torch.finfo(torch.float32).eps, errors


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (lambda x: x, LogitTransform()),
        (lambda x: x.float() / 4, LogitTransform(0.25)),
        (lambda x: 3 * x * 0.5, LogitTransform(1.5)),
        (lambda x: torch.tanh(x / 30.0) * 30.0, LogitTransform(1.0, 30.0)),
        (lambda x: 20 * torch.tanh(x.to(torch.float32) * 0.1), LogitTransform(2.0, 20.0)),
        (lambda x: torch.tanh(x), LogitTransform(1.0, 1.0)),
        (lambda x: x + 1, None),
        (lambda x: 2 / x, None),
        (lambda x: x * torch.tensor(2.0), None),
        (lambda x: torch.tanh(torch.tanh(x)), None),
        (lambda x: -2 * torch.tanh(x), None),
        (lambda x: x.to(torch.float64), None),
    ],
)
def test_a_scale_and_a_soft_cap_are_read_from_what_a_model_does(steps, expected):
    from deepspeed_alst.tiling.lazy_logits import LazyHead, LazyLogits

    linear = torch.nn.Linear(8, 5)
    logits = steps(LazyLogits(LazyHead(linear, linear.forward, TiledLossConfig()), torch.randn(2, 3, 8)))
    found = fuse_ops(logits._ops)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert (found.logit_scale, found.softcap) == pytest.approx((expected.logit_scale, expected.softcap))


@pytest.mark.slow
def test_the_ledger_sees_a_kernel_that_keeps_one_value_a_logit(interpreted):
    assert loss_tile_rows(TiledLossConfig(), 128256, in_place=True) == 2092
    same_tile, same_bytes = interpreted.run(tile_peak, "triton", 523), interpreted.run(tile_peak, "triton", None)
    by_torch = interpreted.run(tile_peak, "torch", 523)
    # An fp32 copy and a bf16 gradient fewer; with a quarter of the bytes a logit, four times the rows fit.
    assert by_torch - same_tile > 1.4 * 523 * 128256 * 4
    assert same_bytes < 1.02 * by_torch


@pytest.mark.slow
def test_a_layer_by_ligers_kernels_needs_less_at_its_peak():
    own, norms, all_parts = (layer_peak("llama", liger) for liger in (False, NORMS_AND_ROPE, True))
    assert norms <= 0.68 * own and all_parts <= 0.68 * own


def test_only_launches_on_fake_tensors_are_skipped_and_only_until_the_undo(monkeypatch):
    from triton.runtime import Autotuner, JITFunction

    from deepspeed_alst.kernels.registry import skip_fake_launches
    from deepspeed_alst.profiler.fake import fake_world

    for kind in (JITFunction, Autotuner):
        monkeypatch.setattr(kind, "run", lambda self, *args, **kwargs: "launched")
    with PatchSet() as undo:
        skip_fake_launches(undo)
        with fake_world(1):
            fake = torch.zeros(1)
        for kind in (JITFunction, Autotuner):
            assert kind.run(None, torch.zeros(1), grid=(1,)) == "launched"
            assert kind.run(None, fake, 1, grid=(1,)) is None and kind.run(None, x=fake) is None
    assert JITFunction.run(None, fake) == Autotuner.run(None, fake) == "launched"


# --- in DeepSpeed's engine, by its key


@pytest.fixture(scope="module")
def interpreted_ranks():
    with started_interpreted(2) as ranks:
        yield ranks


def _steps_by_key(stage: int, sp_size: int) -> tuple[float, float, int]:
    """How far three steps by the kernel are from those by torch: loss, gradients; and how many tiles it made."""
    import benchmarks.cells
    from benchmarks.cells import Cell, ds_config, run_alst, run_sp1
    from deepspeed_alst.kernels import cross_entropy

    cell, results = Cell(stage=stage, sp_size=sp_size, gas=2, odd_lengths=True, unequal_labels=True), []
    with mock.patch.object(cross_entropy, "pick", side_effect=cross_entropy.pick) as picked:
        for backend in ("torch", "triton"):

            def with_backend(cell, sp_size, backend=backend):
                config = ds_config(cell, sp_size)
                loss = {"tiled_logits_loss": {"backend": backend, "tile_tokens": 5}}
                return {**config, "alst": {**config.get("alst", {}), **loss}}

            with mock.patch.object(benchmarks.cells, "ds_config", with_backend):
                results.append(run_alst(cell) if sp_size > 1 else run_sp1(cell))
    one, other = results
    worst = max((((other.grads[n] - grad).norm() / grad.norm()).item() for n, grad in one.grads.items()), default=0.0)
    return abs(one.loss - other.loss), worst, picked.call_count


@pytest.mark.parametrize(("stage", "sp_size"), [pytest.param(3, 2, marks=pytest.mark.slow), (2, 1)])
def test_steps_of_an_engine_are_those_of_torchs_tiles(interpreted_ranks, stage, sp_size):
    found = interpreted_ranks.run(_steps_by_key, stage, sp_size)
    assert all(num_tiles > 0 for _, _, num_tiles in found)
    assert max(loss for loss, _, _ in found) < 1e-6 and 0 < max(grads for _, grads, _ in found) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [kernel_cells()[place] for place in (0, 1, 4)],
    ids=lambda cell: cell.name(),
)
def test_three_steps_are_as_exact_as_no_sequence_parallelism(interpreted_ranks, cell):
    row = measure_cell(cell, interpreted_ranks, with_upstream=False)
    assert not isinstance(row.sp1, str), row.sp1
    assert not row.problems()


def _launched_as_on_a_gpu() -> list[str]:
    from benchmarks.gpu.kernels import launches
    from benchmarks.gpu.scale import Sizes

    names = []
    for each in launches("cpu", Sizes(T=16, V=64, F=32, h=16, D=16), torch.float32):
        with faithful() as traffic:
            each.run()
        assert traffic.written and each.moved > 0
        names.append(each.name)
    return names


def test_what_a_gpu_is_timed_with_runs_the_kernels(interpreted):
    assert len(interpreted.run(_launched_as_on_a_gpu)) == 6


# --- where it does not run


def test_without_a_gpu_the_kernel_is_refused_by_name():
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter has leaked out of its process"
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with PatchSet() as undo, pytest.raises(SetupError, match=r"'triton' needs a GPU.*TRITON_INTERPRET=1"):
        tile_loss(
            ModelSpec(_model("llama")), TiledLossConfig(backend="triton"), ForwardContext(), lambda module: None, undo
        )


def test_the_loss_alone_leaves_the_logits_and_reads_them_once(interpreted):
    assert (
        interpreted.run(_loss_alone) == 40 * 4 + 2 * 8 + 4 + 2 * 4 + 2 * 4
    )  # logits, labels, the label's logit, scale, losses


def _loss_alone() -> int:
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_

    logits_tV, labels_t = torch.randn(2, 20), torch.tensor([1, -100])
    expected, before = F.cross_entropy(logits_tV, labels_t, reduction="sum"), logits_tV.clone()
    with faithful() as traffic:
        loss = cross_entropy_(logits_tV, labels_t, torch.tensor(1.0), gradient=False)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(logits_tV, before)
    return traffic.read + traffic.written


def test_a_kernel_that_is_wrong_on_a_device_is_left_alone_with_a_warning(monkeypatch):
    from deepspeed_alst.kernels import registry
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_reference

    right = registry.OPS["cross_entropy"]

    def off(logits_tV, *rest):
        loss = cross_entropy_reference(logits_tV, *rest)
        logits_tV *= 1.0001
        return loss

    def broken(*arguments):
        raise RuntimeError("no such instruction")

    # No GPU is here: the check runs on the CPU instead.
    check, device = registry._find_mismatch, torch.device("cuda", 0)
    monkeypatch.setattr(registry, "_find_mismatch", lambda op, _: check(op, torch.device("cpu")))
    for op, words in ((off, "result 1 has error"), (broken, "RuntimeError: no such instruction")):
        monkeypatch.setitem(registry.OPS, "cross_entropy", types.SimpleNamespace(**{**vars(right), "op": op}))
        registry._passes_check.cache_clear()
        with pytest.warns(RuntimeWarning, match=f"cross_entropy is disabled on cuda:0, PyTorch computes it: {words}"):
            assert not registry.has_kernel("cross_entropy", device)
    monkeypatch.setitem(
        registry.OPS, "cross_entropy", types.SimpleNamespace(**{**vars(right), "op": cross_entropy_reference})
    )
    registry._passes_check.cache_clear()
    assert registry.has_kernel("cross_entropy", device)
    registry._passes_check.cache_clear()


def test_on_cpu_torch_computes_and_tensors_without_data_take_the_kernel(recwarn):
    from deepspeed_alst.kernels.registry import OPS, pick
    from deepspeed_alst.profiler.fake import fake_world

    assert pick("cross_entropy", torch.zeros(1)) is OPS["cross_entropy"].reference
    with fake_world(1):
        assert pick("cross_entropy", torch.zeros(1)) is OPS["cross_entropy"].op
        assert pick("cross_entropy", torch.zeros(1, dtype=torch.float64)) is OPS["cross_entropy"].reference
    assert not [each for each in recwarn if "deepspeed_alst" in str(each.message)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the kernel is not run on one")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_it_is_as_good_as_torch(dtype):
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_, cross_entropy_reference

    for V in (63, 50257, 128256):
        logits_tV, labels_t = torch.randn(64, V, device="cuda").to(dtype), torch.randint(0, V, (64,), device="cuda")
        same_tV, truth_tV, scale = logits_tV.clone(), logits_tV.double(), torch.tensor(0.5, device="cuda")
        for each in (same_tV, truth_tV):
            cross_entropy_reference(each, labels_t, scale, 0.1, 30.0, 0.7)
        cross_entropy_(logits_tV, labels_t, scale, 0.1, 30.0, 0.7)
        found = measure(logits_tV, same_tV, truth_tV)
        assert all(error <= most for error, most in found.values()), found


# --- the shims


def _shims() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def add(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # bf16 is not cast first
        lanes = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + lanes, mask=lanes < n)
        tl.store(y_ptr + lanes, x + x, mask=lanes < n)

    @triton.jit
    def beyond(x_ptr, y_ptr, BLOCK: tl.constexpr):
        lanes = tl.arange(0, BLOCK)
        tl.store(y_ptr + lanes, tl.load(x_ptr + lanes).to(tl.float32))

    x, y = torch.ones(8, dtype=torch.bfloat16), torch.ones(7)
    for kernel, arguments, words in ((add, (x, y, 4), "arithmetic on bf16"), (beyond, (x, y), "1 of 8 lanes")):
        try:
            with faithful():
                kernel[(1,)](*arguments, BLOCK=8)
        except Exception as error:
            assert words in str(error), error
            assert words != "1 of 8 lanes" or OutOfBoundsError.__name__ in str(error)
        else:
            raise AssertionError(f"nothing said {words}")


def test_the_interpreter_refuses_arithmetic_on_bf16_and_access_beyond_a_tensor(interpreted):
    interpreted.run(_shims)


def test_bf16_is_rounded_to_nearest_even():
    values = torch.randn(1000) * 10.0 ** torch.randint(-40, 38, (1000,))
    assert torch.equal(torch.from_numpy(round_to_bf16(values.numpy())).view(torch.bfloat16), values.bfloat16())
