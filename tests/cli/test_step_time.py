"""The time of a step: each part against a count by hand, what hides behind computation, and the pairs of attention."""

from dataclasses import replace

import pytest
import torch

from deepspeed_alst.cli.fake_layer import Flops
from deepspeed_alst.cli.measure import Layer, Line, Model
from deepspeed_alst.cli.memory import GIB, Machine, Plan
from deepspeed_alst.cli.step_time import Part, Rates, micro_steps, step_time
from deepspeed_alst.monitoring.step_flops import Span, StepFlops
from deepspeed_alst.offload.budget import LayerSizes

SPANS = ((Span(), 3), (Span(window=7), 2), (Span(chunk=5), 1))
STEP = StepFlops(SPANS, token=6000.0, token_again=0.0, pair=600.0, pair_again=0.0)
MODEL = Model(10**6, 10**5, LayerSizes(6, 1, 8192, 8192, 128, 0, 0), exchanged=700, step=STEP)
LAYER = Layer(Line(0, 0), Line(0, 0), Line(0, 0), Line(0, 0), Flops(100.0, 400.0, 50.0))
MACHINE = Machine(16, 80 * GIB, 1000 * GIB, 8)
RATES = Rates(flops=1000.0, link=100.0, host_link=10.0, disk=5.0)
DS_CONFIG = {
    "bf16": {"enabled": True},
    "gradient_accumulation_steps": 3,
    "zero_optimization": {"stage": 3},
    "sequence_parallel_size": 8,
}
TOKENS = 13
PAIRS = sum(layers * int(span.seen(torch.arange(8 * TOKENS)).sum()) for span, layers in SPANS)
ATTENTION = 200 * PAIRS / 8 / 1000  # seconds of a forward


def parts_of(ds_config=DS_CONFIG, plan=None, model=MODEL, rates=RATES, machine=MACHINE):
    found = step_time(model, LAYER, ds_config, machine, plan or Plan(TOKENS, {}, {}, 0.0, 0, ""), rates)
    assert found.seconds == pytest.approx(sum(part.exposed for part in found.parts.values()))
    return found.parts


@pytest.mark.parametrize("span", [Span(), Span(window=7), Span(window=1), Span(chunk=5)])
@pytest.mark.parametrize("tokens", [0, 1, 5, 7, 8, 63])
def test_pairs_in_closed_form_are_those_of_each_token(span, tokens):
    assert span.seen_by_all(tokens) == int(span.seen(torch.arange(tokens)).sum())


def test_computation_and_all_to_alls_count_in_full():
    parts = parts_of()
    matrices = 3 * TOKENS * (6 * 400 + 50) / 1000
    assert parts["matrix products"] == pytest.approx(Part(matrices, matrices))
    # Forward twice, and a backward of two and a half; with the output saved, forward once.
    assert parts["attention"].exposed == pytest.approx(3 * 4.5 * ATTENTION)
    some, saved = (parts_of(plan=Plan(TOKENS, {}, {}, 0.0, num_saved, "")) for num_saved in (2, 6))
    assert some["attention"].exposed == pytest.approx(3 * (4.5 - 2 / 6) * ATTENTION)
    assert saved["attention"].exposed == pytest.approx(3 * 3.5 * ATTENTION)
    assert parts["all-to-all"].exposed == saved["all-to-all"].exposed == pytest.approx(3 * 3 * TOKENS * 6 * 700 / 100)


@pytest.mark.parametrize(("stage", "a_weight", "times"), [(0, 4, 1), (1, 4, 1), (2, 4, 3), (3, 2, 3)])
def test_gradients_are_reduced_in_each_micro_step_from_stage_2_on(stage, a_weight, times):
    parts = parts_of({**DS_CONFIG, "zero_optimization": {"stage": stage}})
    assert parts["gradient reduction"].exposed == pytest.approx(times * a_weight * 10**6 * 15 / 16 / 100)
    assert ("weight gathers" in parts) == (stage == 3)


def test_copies_hide_behind_the_computation_of_their_pass_only():
    forward, backward = (TOKENS * 6 * 100 / 1000 + ATTENTION, TOKENS * 6 * 300 / 1000 + 3.5 * ATTENTION)
    gather = 2 * 10**6 * 15 / 16 / 100
    assert parts_of()["weight gathers"] == pytest.approx(Part(6 * gather, 3 * (2 * gather - forward - backward)))
    fast = replace(RATES, link=1e9)
    assert parts_of(rates=fast)["weight gathers"].exposed == 0
    offload = {**DS_CONFIG, "alst": {"activation_checkpoint_cpu_offload": True}}
    size = MODEL.layers.offloaded_bytes(TOKENS, 0)
    parts = parts_of(offload)
    assert parts["copies to the host"] == pytest.approx(Part(3 * size / 10, 3 * (size / 10 - forward)))
    assert parts["copies from the host"] == pytest.approx(Part(3 * size / 10, 3 * (size / 10 - backward)))
    kept = parts_of(offload, Plan(TOKENS, {}, {}, 0.0, 2, ""))
    assert kept["copies to the host"].seconds == pytest.approx(3 * MODEL.layers.offloaded_bytes(TOKENS, 2) / 10)
    spilled = parts_of(offload, Plan(TOKENS, {}, {}, 1e6, 0, ""))
    assert spilled["disk"].seconds == pytest.approx(3 * 2 * 1e6 / 5) and "disk" not in parts


def test_states_on_the_host_are_copied_and_updated_there():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    parts = parts_of({**DS_CONFIG, "zero_optimization": zero})
    shard = 10**6 / 16
    assert parts["copies to the host"].seconds == pytest.approx(3 * 2 * shard / 10)  # gradients, in each micro-step
    assert parts["copies from the host"].seconds == pytest.approx(3 * 2 * 2 * shard / 10)  # weights, in both passes
    # Once a step, by the eight ranks of a host.
    assert parts["optimizer on the host"].exposed == pytest.approx(8 * shard * 30 / 200e9 + 2 * shard / 10)


def test_groups_within_a_host_use_nvlink():
    rates = replace(RATES, link=None)
    assert (rates.to_gpus(8, MACHINE), rates.to_gpus(9, MACHINE)) == (450e9, 50e9)
    assert parts_of(rates=rates)["all-to-all"].exposed == pytest.approx(3 * 3 * TOKENS * 6 * 700 / 450e9)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"gradient_accumulation_steps": 4}, 4),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2}, 6),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": "auto"}, 1),
        ({}, 1),
    ],
)
def test_micro_steps_are_those_of_the_batch_keys(keys, steps):
    assert micro_steps(keys, 2) == steps


def test_a_model_without_known_sizes_has_no_time():
    assert step_time(replace(MODEL, step=None), LAYER, DS_CONFIG, MACHINE, Plan(1, {}, {}, 0.0, 0, ""), RATES) is None
