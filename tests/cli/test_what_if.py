"""What-ifs: one key at a time, the cheapest keys, shared measurements, and the ds_config that is written."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from transformers import CONFIG_MAPPING

from deepspeed_alst.cli import measure
from deepspeed_alst.cli.fake_layer import Flops
from deepspeed_alst.cli.main import main
from deepspeed_alst.cli.measure import Layer, Line, Measuring, Model
from deepspeed_alst.cli.memory import GIB, Machine
from deepspeed_alst.cli.plan import default_config
from deepspeed_alst.cli.step_time import Rates
from deepspeed_alst.cli.what_if import WhatIf, added_keys, changed, single_changes
from deepspeed_alst.config.schema import parse
from deepspeed_alst.monitoring.step_flops import Span, StepFlops
from deepspeed_alst.offload.budget import LayerSizes

DS_CONFIG = {
    "bf16": {"enabled": True},
    "gradient_accumulation_steps": 8,
    "zero_optimization": {"stage": 3},
    "sequence_parallel_size": 8,
}
MACHINE = Machine(8, 80 * GIB, 1000 * GIB, 8)
RATES = Rates(500e12, None, 25e9, 5e9)
LEAN, OFFLOAD, SAVE = "alst.memory_lean_layer", "alst.activation_checkpoint_cpu_offload", "alst.save_attention_output"


class MadeUp:
    """Stands for Measuring: tiles divide a layer's bytes, chunks divide them again and cost FLOPs."""

    def __init__(self):
        self.measured = Counter()

    def of(self, keys):
        alst = keys.alst
        lean, tiled = alst.memory_lean_layer is not None, alst.tiled_mlp_compute is not None
        self.measured["lean" if lean else "ordinary"] += 1
        a_token = 10e3 if lean else 50e3 if tiled else 100e3
        flops = Flops(1e9, 7e9 if lean else 6e9, 2e9)
        outside = Line(0, 1e3 if keys.tiled_loss() else 1e6)
        layer = Layer(Line(0, 0), Line(GIB, a_token), outside, Line(0, 0), flops)
        saved = LayerSizes(32, int(alst.activation_checkpoint_cpu_offload is not None), 8192, 8192, 128, 10**9, 4096)
        step = StepFlops(((Span(), 32),), token=48e9, token_again=0.0, pair=6 * 8192, pair_again=0.0)
        return Model(8 * 10**9, 10**8, saved, 17920, step), dict.fromkeys((False, True), layer)


def what_if(ds_config=DS_CONFIG, machine=MACHINE):
    made_up = MadeUp()
    return WhatIf(made_up, ds_config, machine, RATES), made_up


def names(variants):
    return [each.name for each in variants]


def test_each_key_is_switched_once():
    assert names(what_if()[0].one_at_a_time(None)) == [
        "as given",
        "tiled_logits_loss: false",
        "tiled_mlp_compute: true",
        "memory_lean_layer: true",
        "activation_checkpoint_cpu_offload: true, save_attention_output: false",
        "activation_checkpoint_cpu_offload: true, save_attention_output: true",
        "offload_optimizer: cpu",
        "offload_param: cpu",
        "stage: 1",
        "stage: 2",
    ]
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    given = {**DS_CONFIG, "zero_optimization": zero, "activation_checkpoint_cpu_offload": True}
    assert names(what_if(given)[0].one_at_a_time(None))[4:] == [
        "activation_checkpoint_cpu_offload: false",
        "offload_optimizer: off",
        "offload_param: off",
        "save_attention_output: false",
        "save_attention_output: true",
        "stage: 1, offload_param: off",
        "stage: 2, offload_param: off",
    ]


def test_switching_twice_gives_the_same_plan():
    given = {**DS_CONFIG, "alst": {"tiled_mlp_compute": True}, "activation_checkpoint_cpu_offload": True}
    for keys in single_changes(given):
        assert given == {**DS_CONFIG, "alst": {"tiled_mlp_compute": True}, "activation_checkpoint_cpu_offload": True}
        assert parse(changed(given, keys)) != parse(given) or any(path.startswith("zero") for path in keys)
    off = changed(given, {OFFLOAD: False})
    assert off["activation_checkpoint_cpu_offload"] is False and off["alst"] == given["alst"]
    assert changed(given, {"zero_optimization.offload_param": None})["zero_optimization"] == {"stage": 3}


def test_variants_are_compared_at_one_length():
    given, *others = what_if()[0].one_at_a_time(None)
    assert all(each.plan.tokens == given.plan.tokens == given.longest // 8 for each in others)
    by_name = {each.name: each for each in others}
    assert by_name["tiled_mlp_compute: true"].longest > given.longest > by_name["tiled_logits_loss: false"].longest
    assert by_name["memory_lean_layer: true"].time.seconds > given.time.seconds
    saved = by_name["activation_checkpoint_cpu_offload: true, save_attention_output: true"]
    assert saved.time.seconds < given.time.seconds and sum(saved.plan.host.values()) > 0
    given, *others = what_if()[0].one_at_a_time(1001)
    assert {each.plan.tokens for each in (given, *others)} == {126}


def brute_force(ds_config, sequence, machine=MACHINE):
    """The cheapest rank of all sets, every one of them planned."""
    what, _ = what_if(ds_config, machine)
    given = what.variant({}, sequence)
    variants = [what.variant(keys, sequence) for keys in added_keys(ds_config)]
    fitting = [each for each in variants if not each.plan.over(machine)]
    return min(((round(each.time.seconds / given.time.seconds, 3), len(each.keys)) for each in fitting), default=None)


@pytest.mark.parametrize(("stage", "sequence"), [(1, 100_000), (3, 4_000_000), (3, 10**9)])
def test_the_cheapest_keys_are_those_of_all_sets(stage, sequence):
    given = {**DS_CONFIG, "zero_optimization": {"stage": stage}}
    what, _ = what_if(given)
    found, best = what.cheapest(sequence), brute_force(given, sequence)
    assert (found is None) == (best is None)
    if found is not None:
        seconds = found.time.seconds / what.variant({}, sequence).time.seconds
        assert (round(seconds, 3), len(found.keys)) == best and not found.plan.over(MACHINE)


def test_a_set_that_fits_without_chunks_needs_no_measurement_of_them():
    what, made_up = what_if()
    assert LEAN not in what.cheapest(1_000_000).keys and not made_up.measured["lean"]
    what, made_up = what_if(machine=Machine(8, 30 * GIB, 1000 * GIB, 8))
    assert LEAN in what.cheapest(3_900_000).keys and made_up.measured["lean"]


def test_variants_of_one_layer_share_its_measurement(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    CONFIG_MAPPING["llama"](**sizes, vocab_size=128, num_hidden_layers=3).to_json_file(tmp_path / "config.json")
    cases, run = [], measure.bytes_of
    monkeypatch.setattr(measure, "bytes_of", lambda *case: cases.append(case) or run(*case))
    measuring, given = Measuring(str(tmp_path / "config.json")), {**DS_CONFIG, "sequence_parallel_size": 2}
    offload = {**given, "alst": {"activation_checkpoint_cpu_offload": True}}
    first = measuring.of(parse(offload))
    assert len(cases) == 10  # two lengths and two numbers of layers, with attention's output and without; a long loss
    for saves in (False, True):
        saved = {**offload, "alst": {**offload["alst"], "save_attention_output": saves}}
        assert measuring.of(parse(saved))[1] == {saves: first[1][saves]}
    assert len(cases) == 10
    tiled = {**offload, "alst": {**offload["alst"], "tiled_mlp_compute": True}}
    model, _ = measuring.of(parse(tiled))
    assert len(cases) == 14 and model.layers == first[0].layers  # what layers save does not depend on tiles
    alone = Measuring(str(tmp_path / "config.json")).of(parse(tiled))
    assert measuring.of(parse(tiled)) == alone


@pytest.mark.parametrize(
    ("num_gpus", "heads", "kv_heads", "sp_size"), [(8, 32, 8, 8), (64, 32, 8, 32), (8, 28, 4, 8), (8, 6, 2, 4)]
)
def test_the_default_shares_a_sequence_among_as_many_gpus_as_the_heads_allow(num_gpus, heads, kv_heads, sp_size):
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert parse(default_config(config, num_gpus)).sequence_parallel_size == sp_size


@pytest.mark.slow
def test_the_cheapest_ds_config_is_accepted_as_fitting(tmp_path, capsys):
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    CONFIG_MAPPING["llama"](**sizes, vocab_size=512, num_hidden_layers=32).to_json_file(tmp_path / "config.json")
    words = ["plan", "--model", str(tmp_path / "config.json"), "--num_gpus", "2", "--gpu_memory", "8", "--json"]
    words += ["--seq_len", "800001"]
    assert main(words) == 1
    given = json.loads(capsys.readouterr().out)
    assert not given["fits"] and given["ds_config"]["sequence_parallel_size"] == 2
    out = str(tmp_path / "out.json")
    assert main([*words, "--cheapest", "--write", out]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["cheapest"]["longest"] >= 800001 > said["longest"] == given["longest"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == said["cheapest"]["ds_config"] and written != given["ds_config"]
    assert main([*words, "--ds_config", out]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["fits"] and again["longest"] == said["cheapest"]["longest"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cheapest"], "--seq_len"),
        (["--write", "x.json"], "--cheapest"),
        (["--margin", "1"], "--margin 1.0"),
        (["--host_link", "0"], "--host_link 0.0"),
    ],
)
def test_options_without_what_they_need_are_refused(words, said, capsys):
    assert main(["plan", "--model", "config.json", *words]) == 2
    assert said in capsys.readouterr().err


def test_layers_that_run_in_chunks_in_long_shards_are_planned_as_ordinary_in_short_ones():
    lean, auto = (DS_CONFIG | {"alst": {"memory_lean_layer": each}} for each in (True, "auto"))
    least = parse(auto).alst.memory_lean_layer.min_tokens
    for tokens, like in ((least - 1, DS_CONFIG), (least, lean)):
        expected, found = (what_if(each)[0].variant({}, 8 * tokens).plan for each in (like, auto))
        assert found.device == expected.device
    few = Machine(8, 21 * GIB, 1000 * GIB, 8)
    short, expected, long = (what_if(each, few)[0].variant({}).longest for each in (auto, DS_CONFIG, lean))
    assert 0 < short == expected < long < 8 * least


def test_auto_is_planned_as_off_on_one_rank_without_the_offload():
    one = DS_CONFIG | {"sequence_parallel_size": 1}
    machine = Machine(1, 800 * GIB, 1000 * GIB, 1)
    off, auto = (
        what_if(one | {"alst": {"memory_lean_layer": each}}, machine)[0].variant({}) for each in (False, "auto")
    )
    assert auto.longest == off.longest > 0
