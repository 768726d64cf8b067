"""``ds_alst plan``: its arithmetic against ZeRO's table, its line against a longer measurement, what it prints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from deepspeed_alst.cli.main import main
from deepspeed_alst.cli.plan import Layer, Machine, Model, bytes_of, longest, measure, plan_of, static_bytes
from deepspeed_alst.config.schema import parse

ROOT = Path(__file__).parents[2]
GIB = 2**30
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
DS_CONFIG = {
    "bf16": {"enabled": True},
    "gradient_accumulation_steps": 8,
    "zero_optimization": {"stage": 3},
    "sequence_parallel_size": 8,
    "alst": {"tiled_mlp_compute": True, "activation_checkpoint_cpu_offload": True},
}
H100 = Machine(8, 80 * GIB, 1800 * GIB, 8)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "config.json"
    CONFIG_MAPPING["llama"](**LLAMA_8B).to_json_file(path)
    return path, *measure(str(path), parse(DS_CONFIG))


def test_the_sizes_are_those_of_the_model(measured):
    _, model, layer = measured
    assert model.num_params == 8_030_261_248 and model.num_layers == 32
    assert model.largest == 128256 * 4096
    assert layer.kept == 2 * 4096  # a checkpoint is one hidden vector


def test_the_line_through_two_measurements_holds_further_on(measured):
    _, _, layer = measured
    config = CONFIG_MAPPING["llama"](**{**LLAMA_8B, "num_hidden_layers": 1})
    far = 4 * 65536
    in_layers, *_ = bytes_of(config, parse(DS_CONFIG), far)
    assert layer.fixed + layer.a_token * far == pytest.approx(in_layers, rel=0.02)


@pytest.mark.parametrize(
    "stage, a_parameter", [(0, 2 + 2 + 12), (1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, 16 / 8)]
)
def test_states_are_sharded_by_stage(stage, a_parameter):
    model = Model(10**9, 10, 10**8)
    device, host = static_bytes(model, {**DS_CONFIG, "zero_optimization": {"stage": stage}}, H100)
    assert sum(device[key] for key in ("weights", "gradients", "optimizer")) == pytest.approx(a_parameter * 10**9)
    assert not host


@pytest.mark.parametrize(
    ("zero", "reduction", "num_bytes"),
    [
        ({"stage": 3}, {}, 2 * 500_000_000),
        ({"stage": 3, "reduce_bucket_size": 1e6}, {}, 2 * 10**6),
        ({"stage": 2, "overlap_comm": True}, {"bucket_size": 5000}, 4 * 5000),
    ],
)
def test_a_bucket_is_as_large_as_its_key_says(zero, reduction, num_bytes):
    model = Model(8 * 10**9, 10, 10**8)
    ds_config = {**DS_CONFIG, "zero_optimization": zero, "alst": {"reduction": {**reduction, "slice_bytes": 2**20}}}
    device, _ = static_bytes(model, ds_config, H100)
    assert device["gradient buckets, slices"] == num_bytes + 2 * 2**20


def test_an_automatic_bucket_is_a_share_of_what_is_left():
    ds_config = {**DS_CONFIG, "zero_optimization": {"stage": 0}, "alst": {"reduction": {"bucket_size": "auto"}}}
    for billions, numel in ((4, (77 * GIB - 4 * 16 * 10**9) // 32 // 2), (1, 500_000_000), (8, 2**20)):
        device, _ = static_bytes(Model(billions * 10**9, 10, 10**8), ds_config, H100)
        assert device["gradient buckets, slices"] == 2 * numel + 2 * 64 * 2**20


def test_what_is_offloaded_is_on_the_host():
    model, layer = Model(10**9, 10, 10**8), Layer(GIB, 1000.0, GIB, 10.0, 800.0)
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    machine = Machine(16, 80 * GIB, 1000 * GIB, 8)
    plan = plan_of(model, layer, {**DS_CONFIG, "zero_optimization": zero}, machine, 1000)
    assert not {"weights", "optimizer"} & plan.device.keys()
    # Of 16 ranks eight are on this host.
    assert plan.host["optimizer"] == pytest.approx(8 * 16 * 10**9 / 16)
    assert plan.host["gradients"] == pytest.approx(8 * 2 * 10**9 / 16) and "gradients" not in plan.device
    assert plan.host["layer inputs"] == 8 * 9 * 800 * 1000
    disk = {**DS_CONFIG, "alst": {"activation_checkpoint_cpu_offload": {"nvme_path": "/nvme"}}}
    assert plan_of(model, layer, disk, machine, 1000).disk == 0
    far = plan_of(model, layer, disk, machine, 10**10)
    assert sum(far.host.values()) == pytest.approx(1000 * GIB) and not far.over(replace(machine, gpu_bytes=10**15))
    assert far.disk == pytest.approx(8 * 9 * 800 * 10**10 - 1000 * GIB)


@pytest.mark.parametrize("gpu, host, binding", [(80, 10**6, "GPU"), (80, 200, "host")])
def test_the_longest_fits_and_one_token_more_does_not(gpu, host, binding):
    model, layer = Model(8 * 10**9, 32, 5 * 10**8), Layer(GIB, 90_000.0, GIB, 10.0, 8192.0)
    machine = Machine(8, gpu * GIB, host * GIB, 8)
    plan, bound = longest(model, layer, DS_CONFIG, machine)
    assert bound == binding and plan.tokens > 1000 and not plan.over(machine)
    assert plan_of(model, layer, DS_CONFIG, machine, plan.tokens + 1).over(machine) == binding


def test_the_command_says_where_the_bytes_go(measured, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps(DS_CONFIG))
    words = ["plan", "--model", str(measured[0]), "--ds_config", str(tmp_path / "ds.json")]
    assert main([*words, "--seq_len", "500000", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and said["sequence"] == 500_000 and said["longest"] > 500_000
    assert main([*words, "--seq_len", "500000000"]) == 1
    assert "A sequence of 500,000,000 tokens does not fit" in capsys.readouterr().out


def test_a_ds_config_that_is_refused_is_refused_here(measured, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps({**DS_CONFIG, "sequence_parallel_size": 3}))
    assert main(["plan", "--model", str(measured[0]), "--ds_config", str(tmp_path / "ds.json")]) == 2
    assert "sequence_parallel_size=3 does not divide" in capsys.readouterr().err
