"""torch.compile, in every form that a program may use: the parts between the collectives are compiled, and right."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, model_config, run_alst, run_sp1, run_truth, samples, vary
from benchmarks.parity import errors, missed
from benchmarks.ranks import RankError


def _wrapped(backend: str, model: Any) -> Any:
    return torch.compile(model, backend=backend)


def _called_before(backend: str, model: Any) -> Any:
    """Compiled without the package's hooks and attention, before there was an engine."""
    model.compile(backend=backend)
    model(input_ids=torch.arange(24)[None], use_cache=False)
    return model


def _forward(backend: str, model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def _layers_in_place(backend: str, model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def _layers_wrapped(backend: str, model: Any) -> Any:
    model.model.layers = torch.nn.ModuleList([torch.compile(layer, backend=backend) for layer in model.model.layers])
    return model


def _regions(backend: str, model: Any) -> Any:
    from accelerate.utils import compile_regions

    return compile_regions(model, backend=backend)


def _engine(backend: str, engine: Any) -> None:
    engine.compile(backend=backend)


FORMS: dict[str, tuple[int, str, Callable[[str, Any], Any]]] = {
    "engine.compile": (3, "on_engine", _engine),
    "torch.compile(model)": (2, "on_model", _wrapped),
    "model.compile, called before": (0, "on_model", _called_before),
    "model.forward": (1, "on_model", _forward),
    "layers in place": (3, "on_model", _layers_in_place),
    "layers wrapped": (1, "on_model", _layers_wrapped),
    "accelerate's regions": (2, "on_model", _regions),
}
# Traced by dynamo and run as it is. What makes graphs of the backward too takes minutes: make test-full.
QUICK = "eager"
QUICK_FORMS = ("torch.compile(model)", "accelerate's regions")


def compiled(cell: Cell, changed: dict[str, Any]) -> tuple[Any, int]:
    """The cell's results, and how many graphs were compiled in it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    result = run_alst(cell, **changed)
    return result, counters["stats"]["unique_graphs"]


def check(ranks: Any, cell: Cell, form: str, backend: str) -> None:
    _, when, function = FORMS[form]
    truth = run_truth(cell)
    result, graphs = ranks.run(compiled, cell, {when: functools.partial(function, backend)})[0]
    assert graphs >= 4  # before and after attention, in both layers
    assert not missed(errors(result, truth), errors(ranks.run(run_sp1, cell)[0], truth))


@pytest.mark.parametrize("form", QUICK_FORMS)
def test_a_compiled_model_trains_as_one_that_is_not(form, ranks2):
    check(ranks2, Cell(stage=FORMS[form][0]), form, QUICK)


@pytest.mark.slow  # memory_lean/test_lean_behaviour.py has a compiled model without the engine
def test_a_compiled_model_with_layers_in_chunks_is_right(ranks2):
    cell = Cell(stage=2, checkpointing="non-reentrant", lean=True)  # the cell refuses a layer on the ordinary path
    truth, (result, _) = (
        run_truth(cell),
        ranks2.run(compiled, cell, {"on_model": functools.partial(_wrapped, QUICK)})[0],
    )
    assert not missed(errors(result, truth), errors(ranks2.run(run_sp1, cell)[0], truth))


@pytest.mark.slow
def test_a_compiled_adapter_is_right(ranks2):
    check(ranks2, Cell(stage=2, lora=True), "torch.compile(model)", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_backward_is_right_in_every_form(form, ranks2):
    check(ranks2, Cell(stage=FORMS[form][0], odd_lengths=True), form, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_inductor_is_right(stage, ranks2):
    cell = Cell(stage=stage, gas=2, clip=0.5, checkpointing="non-reentrant" if stage == 3 else "")
    check(ranks2, cell, "engine.compile", "inductor")


def misuse(case: str) -> None:
    import deepspeed

    cell = Cell()
    model = vary(build_model(model_config(cell)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(cell, 2))[0]
    try:
        if case == "compiled autograd":
            engine.compile(backend=QUICK, compiled_autograd_enabled=True)
        engine.compile(backend=QUICK)
        batch = samples(cell, 97)[0][dist.get_rank()][0]
        if case == "packed":
            # As packed samples have them: the second of two documents starts at 0 again.
            start = 24 * dist.get_rank()
            positions = torch.arange(start, start + 24)
            positions[12:] -= 12
            batch = {key: value[:, :24] for key, value in batch.items()}
            batch |= {"position_ids": positions[None], "shift_labels": batch["labels"].roll(-1)}
        engine(**batch)
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    "case, sentence",
    [
        ("compiled autograd", "engine.compile(compiled_autograd_enabled=True): not verified"),
        ("whole batch", "it has no position_ids, so it is not split over the ranks"),
        ("packed", "its position_ids restart"),
    ],
)
def test_what_would_be_wrong_stops_a_compiled_model_too(case, sentence, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(misuse, case)
    assert all(error is not None and sentence in str(error) for error in caught.value.errors)
