"""``ds_alst plan``: its arithmetic against ZeRO's table, its line against a longer measurement, what it prints."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from transformers import CONFIG_MAPPING

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.cli import plan as command
from deepspeed_alst.cli.fake_layer import Flops, bytes_of
from deepspeed_alst.cli.main import main
from deepspeed_alst.cli.measure import Layer, Line, Model, exchanged_of, measure, workspace_of
from deepspeed_alst.cli.memory import Machine, longest, plan_of, static_bytes
from deepspeed_alst.config.schema import parse
from deepspeed_alst.offload.budget import LayerSizes, MemoryBudget, describe_output, make_plan

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
H100 = Machine(8, 80 * GIB, 1769 * GIB, 8)
OFFLOAD = {"activation_checkpoint_cpu_offload": True}


def made_up(a_token, layers=10, keep_last=1, **more):
    """Return a model whose layers save 8,192 bytes a token, and as much of attention's output; and its peaks."""
    saved = LayerSizes(layers, keep_last, 8192, 8192, 128, 10**9, 4096, **more)
    layer = Layer(Line(GIB, 10.0), Line(GIB, a_token), Line(GIB, 10.0), Line(0, 20.0), Flops(1.0, 4.0, 2.0))
    return Model(10**9, 10**8, saved), dict.fromkeys((False, True), layer)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "config.json"
    CONFIG_MAPPING["llama"](**LLAMA_8B).to_json_file(path)
    return path, *measure(str(path), parse(DS_CONFIG))


def test_the_sizes_are_those_of_the_model(measured):
    _, model, _ = measured
    assert model.num_params == 8_030_261_248 and model.largest == 128256 * 4096
    layers = model.layers
    assert (layers.num_layers, layers.keep_last, layers.num_lean_layers) == (32, 1, 0)
    # Of a checkpoint one hidden vector, and of attention 32 heads of 128 and an fp32 sum each.
    assert (layers.input_bytes, layers.output_bytes, layers.lse_bytes) == (2 * 4096, 2 * 4096, 4 * 32)


@pytest.mark.slow
def test_the_lines_through_two_measurements_hold_further_on(measured):
    *_, found = measured
    config, far = CONFIG_MAPPING["llama"](**{**LLAMA_8B, "num_hidden_layers": 1}), 4 * 65536
    for keeps, layer in found.items():
        there, _ = bytes_of(config, parse(DS_CONFIG), far, keeps)
        assert layer.elsewhere.at(far) == pytest.approx(there.elsewhere, rel=0.02)
        assert layer.attention.at(far) == pytest.approx(there.attention, rel=0.02)


@pytest.mark.slow
def test_the_line_of_the_loss_holds_where_a_tile_of_it_has_more_tokens_than_the_measurements(tmp_path):
    config = CONFIG_MAPPING["llama"](**{**LLAMA_8B, "vocab_size": 256, "num_hidden_layers": 1})
    config.to_json_file(tmp_path / "config.json")
    _, found = measure(str(tmp_path / "config.json"), parse(DS_CONFIG))
    tokens = 2**23
    there, _ = bytes_of(config, parse({**DS_CONFIG, "alst": {**OFFLOAD, "save_attention_output": False}}), tokens)
    assert found[False].outside.at(tokens) == pytest.approx(there.outside, rel=0.01)


@pytest.mark.slow
def test_chunks_need_less_of_the_device_and_as_much_of_the_host_as_is_planned(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2}
    # Llama 3.1's rotary embedding, which runs in chunks as any other.
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    longer = {"max_position_embeddings": 131072}
    config = CONFIG_MAPPING["llama"](**sizes, vocab_size=1024, num_hidden_layers=3, rope_parameters=rope, **longer)
    config.to_json_file(tmp_path / "config.json")
    keys = DS_CONFIG | {"sequence_parallel_size": 2}
    alst = {"activation_checkpoint_cpu_offload": {"packing": "auto"}}
    alst |= {"tiled_mlp_compute": True, "save_attention_output": False}
    chunks = {"chunk_tokens": 16384, "tile_tokens": 8192}
    ordinary, lean = (parse(keys | {"alst": {**alst, "memory_lean_layer": each}}) for each in (False, chunks))
    (of_ordinary, a), (of_lean, b) = (measure(str(tmp_path / "config.json"), each) for each in (ordinary, lean))
    assert b[False].elsewhere.a_token < 0.5 * a[False].elsewhere.a_token
    assert b[False].attention.a_token < 0.5 * a[False].attention.a_token
    assert of_ordinary.layers.input_bytes == of_lean.layers.input_bytes == 1024
    assert of_ordinary.layers.packing == of_lean.layers.packing == "auto"
    assert (of_lean.layers.num_lean_layers, of_lean.layers.keep_last, of_lean.layers.num_norms) == (3, 0, 1)
    # Nothing of a layer stays on the device, and the host has what the run's own plan says.
    one, more = (CONFIG_MAPPING["llama"](**{**config.to_dict(), "num_hidden_layers": count}) for count in (1, 3))
    tokens = 65536
    (of_one, _), (of_more, layers) = (bytes_of(each, lean, tokens) for each in (one, more))
    assert b[False].elsewhere.at(tokens) == pytest.approx(of_one.elsewhere, rel=0.02)
    assert of_more.saved - of_one.saved < tokens and of_more.elsewhere - of_one.elsewhere < tokens
    assert of_more.host == layers.offloaded_bytes(tokens, 0) == 4 * 1024 * tokens
    of_some, _ = bytes_of(more, lean, tokens, 2)
    assert of_some.host == layers.offloaded_bytes(tokens, 2) > of_more.host


def test_outputs_of_some_layers_are_on_the_host_and_no_longer_on_the_device_than_recomputed_ones():
    config = CONFIG_MAPPING["llama"](**{**LLAMA_8B, "num_hidden_layers": 4})
    keys, tokens = parse(DS_CONFIG), 32768
    (none, layers), (some, _), (every, _) = (bytes_of(config, keys, tokens, count) for count in (0, 2, 4))
    for found, count in ((none, 0), (some, 2), (every, 4)):
        assert found.host == layers.offloaded_bytes(tokens, count)
    assert some[:3] == none[:3] and every.elsewhere > none.elsewhere and every.attention > none.attention


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sp_size", "lean", "line"),
    [
        (32, 8, 8, None, (0, 8 * (4 * 4 * 128 + 4 * 4 * 128))),
        (32, 32, 8, None, (0, 8 * 4 * 4 * 128)),  # no heads to expand
        (32, 8, 32, None, (0, 32 * 4 * 128)),  # nor where each rank has one of each
        (32, 8, 8, {"chunk_tokens": 100, "key_block": 1000}, (512 * (100 * 4 + 1000 * 4), 0)),
        (28, 4, 8, None, (0, 8 * (4 * 4 * 128 + 4 * 4 * 128))),  # of the ranks that have 4 of the 28
        (40, 10, 8, None, (0, 8 * 4 * 5 * 128)),  # KV heads that are repeated for each query head before
        (8, 8, 16, None, (0, 4 * 128 / 2)),  # stripes of half of a shard's rows
        (14, 2, 16, None, (2**16 * 4 * 7 * 128, (4 * 7 * 128 + 4 * 7 * 128) / 8)),
    ],
)
def test_the_kernel_allocates_by_its_rows_and_keys(heads, kv_heads, sp_size, lean, line):
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=128 * heads)
    keys = parse({"sequence_parallel_size": sp_size, "alst": {"memory_lean_layer": lean or False}})
    assert workspace_of(config, keys) == line


@pytest.mark.parametrize(
    ("heads", "kv_heads", "exchanged"),
    [
        (32, 8, 7 * 2 * (4 + 1)),
        # It receives 4 + 2 heads of 7 others' tokens, and 24 heads of outputs of its own.
        (28, 4, 7 * (4 + 2 * 1) + 24),
        (4, 2, 7 * 2 * (1 / 2 + 1)),  # half of the rows, and the keys of all
    ],
)
def test_the_wire_is_that_of_the_rank_with_the_most_heads(heads, kv_heads, exchanged):
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=128 * heads)
    assert exchanged_of(config, parse({"sequence_parallel_size": 8})) == exchanged * 128 * 2


def test_unequal_heads_are_planned_for_the_rank_with_the_most(tmp_path, capsys):
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    CONFIG_MAPPING["qwen3"](**sizes, num_attention_heads=7, num_key_value_heads=1).to_json_file(tmp_path / "c.json")
    (tmp_path / "ds.json").write_text(json.dumps({**DS_CONFIG, "sequence_parallel_size": 2}))
    words = ["plan", "--ds_config", str(tmp_path / "ds.json"), "--model", str(tmp_path / "c.json"), "--num_gpus", "2"]
    assert main([*words, "--seq_len", "65536"]) == 0
    said = (
        "3 or 4 of 7 query heads per rank, at most 1.14 of the mean; memory and time are those of a rank with the most"
    )
    assert said in capsys.readouterr().out
    config = CONFIG_MAPPING["qwen3"](**{**sizes, "num_hidden_layers": 1}, num_attention_heads=7, num_key_value_heads=1)
    keys, found = parse({**DS_CONFIG, "sequence_parallel_size": 2}), []
    for largest in (0, 1):
        with mock.patch.object(HeadPlan, "largest_rank", largest):
            found.append(bytes_of(config, keys, 8192)[0].attention)
    assert found[HeadPlan(2, 7, 1).largest_rank] == max(found) > min(found)


def test_whole_keys_and_values_on_more_ranks_than_heads_are_planned_for():
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    config, found = CONFIG_MAPPING["qwen3"](**sizes, num_attention_heads=2, num_key_value_heads=2), {}
    for sp_size in (4, 8):
        keys = parse({**DS_CONFIG, "sequence_parallel_size": sp_size})
        low, high = (bytes_of(config, keys, tokens)[0].attention for tokens in (1024, 2048))
        found[sp_size] = (high - low) / 1024
    # Of each token of the sequence, of which there are more at SP 8: K, V and their fp32 sums.
    assert found[8] - found[4] >= 4 * 2 * 8 * (2 + 4), found


def test_the_workspace_counts_where_attentions_backward_is_the_peak():
    model, found = made_up(15.0)
    plan = plan_of(model, found, DS_CONFIG, H100, 1000)
    assert plan.device["attention kernel's workspace"] == 20_000
    assert plan.device["backward of a layer"] == GIB + 10_000
    model, found = made_up(31.0)
    plan = plan_of(model, found, DS_CONFIG, H100, 1000)
    assert plan.device["backward of a layer"] == GIB + 31_000 and "attention kernel's workspace" not in plan.device


@pytest.mark.parametrize(
    ("keys", "host_gib", "kept", "why"),
    [
        ({**OFFLOAD, "save_attention_output": True}, 1769, True, "save_attention_output"),
        ({**OFFLOAD, "save_attention_output": False}, 1769, False, "save_attention_output"),
        (OFFLOAD, 1769, True, "auto: its copy overlaps with computation, and fits on the host"),
        (OFFLOAD, 100, False, "auto: it exceeds the host's memory"),
        ({}, 1769, False, "auto: no offload"),
        ({"save_attention_output": True}, 1769, True, "save_attention_output"),
    ],
)
def test_attentions_output_is_counted_where_it_is_kept(keys, host_gib, kept, why):
    tokens, machine = 2**18, replace(H100, host_bytes=host_gib * GIB)
    model, found = made_up(10.0, keep_last=int("activation_checkpoint_cpu_offload" in keys))
    plan = plan_of(model, found, {**DS_CONFIG, "alst": keys}, machine, tokens)
    assert plan.attention == f"{'saved' if kept else 'recomputed'} ({why})"
    a_layer = {"layer inputs": 8192 * tokens} | ({"attention outputs": (8192 + 128) * tokens} if kept else {})
    for name, size in a_layer.items():
        # Nine of ten layers wait, on each of eight ranks' host; one more than the measured comes back.
        assert plan.host.get(name, 0) == (8 * 9 * size if keys.keys() & OFFLOAD.keys() else 0)
        assert plan.device[name] == (1 if keys.keys() & OFFLOAD.keys() else 9) * size
    assert ("attention outputs" in plan.device) == kept


@pytest.mark.parametrize("packing", [False, "lossless"])
def test_outputs_of_as_many_layers_as_the_host_has_room_for_are_planned_as_a_run_does(packing):
    model, found = made_up(10.0, packing=packing)
    found = found | {True: replace(found[True], elsewhere=Line(2 * GIB, 20.0))}  # as if saving took more of the device
    tokens, keys = 2**18, {**DS_CONFIG, "alst": OFFLOAD}
    for count, saved in ((0, 0), (4, 4), (8, 8), (9, 10)):
        unpacked = replace(model.layers, packing=False).offloaded_bytes(tokens, 0)  # all inputs, as overflows are
        inputs, needed = (model.layers.offloaded_bytes(tokens, each) for each in (0, count))
        machine = replace(H100, host_bytes=8 * (unpacked + needed - inputs))
        plan = plan_of(model, found, keys, machine, tokens)
        run = make_plan(model.layers, tokens, MemoryBudget(int(machine.host_bytes) // 8), "auto", (8, 1))
        assert plan.num_saved == run.num_saved == saved
        assert sum(plan.host.values()) == 8 * run.host_bytes == 8 * needed
        assert plan.host.get("attention outputs", 0) == 8 * (needed - inputs)
        assert plan.attention == f"{describe_output(saved, 10)} ({run.reason})"
        alike = plan_of(
            model, found, {**DS_CONFIG, "alst": OFFLOAD | {"save_attention_output": saved == 10}}, H100, tokens
        )
        assert plan.device == alike.device


@pytest.mark.parametrize(("lean", "keep_last", "count"), [(0, 0, 1), (0, 1, 1), (0, 3, 2), (10, 0, 0), (10, 3, 2)])
def test_the_device_has_the_inputs_of_the_layers_that_stay_or_come_back(lean, keep_last, count):
    model, found = made_up(10.0, keep_last=keep_last, num_lean_layers=lean, chunk_tokens=8192)
    plan = plan_of(model, found, {**DS_CONFIG, "alst": {**OFFLOAD, "save_attention_output": False}}, H100, 8192)
    assert plan.device.get("layer inputs", 0) == count * 8192 * 8192
    assert plan.host["layer inputs"] == 8 * (10 - keep_last) * 8192 * 8192


def test_packing_lengthens_what_the_host_has_room_for_if_the_model_is_bf16():
    keys = {**DS_CONFIG, "alst": {**OFFLOAD, "save_attention_output": False}}
    machine = Machine(8, 2**20 * GIB, 100 * GIB, 8)
    plain, lossless, auto = (
        longest(*made_up(10.0, packing=each), keys, machine)[0] for each in (False, "lossless", "auto")
    )
    assert lossless.tokens == auto.tokens > 1.36 * plain.tokens
    half = plan_of(*made_up(10.0, packing="auto"), keys, machine, plain.tokens // 2)
    assert half.host["layer inputs"] == pytest.approx(plain.host["layer inputs"] / 2, rel=1e-3)
    packed = plan_of(*made_up(10.0, packing="lossless"), keys, machine, plain.tokens)
    assert packed.host["layer inputs"] <= 11.7 / 16 * plain.host["layer inputs"]
    fp16 = {**keys, "bf16": {"enabled": False}, "fp16": {"enabled": True}}
    assert longest(*made_up(10.0, packing="lossless"), fp16, machine)[0].tokens == plain.tokens


@pytest.mark.parametrize(
    "stage, a_parameter", [(0, 2 + 2 + 12), (1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, 16 / 8)]
)
def test_states_are_sharded_by_stage(stage, a_parameter):
    model = Model(10**9, 10**8)
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
    model = Model(8 * 10**9, 10**8)
    ds_config = {**DS_CONFIG, "zero_optimization": zero, "alst": {"reduction": {**reduction, "slice_bytes": 2**20}}}
    device, _ = static_bytes(model, ds_config, H100)
    assert device["gradient buckets, slices"] == num_bytes + 2 * 2**20


def test_an_automatic_bucket_is_a_share_of_what_is_left():
    ds_config = {**DS_CONFIG, "zero_optimization": {"stage": 0}, "alst": {"reduction": {"bucket_size": "auto"}}}
    for billions, numel in ((4, (77 * GIB - 4 * 16 * 10**9) // 32 // 2), (1, 500_000_000), (8, 2**20)):
        device, _ = static_bytes(Model(billions * 10**9, 10**8), ds_config, H100)
        assert device["gradient buckets, slices"] == 2 * numel + 2 * 64 * 2**20


def test_what_is_offloaded_is_on_the_host():
    model, layer = made_up(1000.0)
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    machine = Machine(16, 80 * GIB, 1000 * GIB, 8)
    plan = plan_of(model, layer, {**DS_CONFIG, "zero_optimization": zero}, machine, 1000)
    assert not {"weights", "optimizer"} & plan.device.keys()
    # Of 16 ranks eight are on this host.
    assert plan.host["optimizer"] == pytest.approx(8 * 16 * 10**9 / 16)
    assert plan.host["gradients"] == pytest.approx(8 * 2 * 10**9 / 16) and "gradients" not in plan.device
    assert plan.host["layer inputs"] == 8 * 9 * 8192 * 1000
    disk = {**DS_CONFIG, "alst": {"activation_checkpoint_cpu_offload": {"nvme_path": "/nvme"}}}
    assert plan_of(model, layer, disk, machine, 1000).disk == 0
    far = plan_of(model, layer, disk, machine, 10**10)
    assert sum(far.host.values()) == pytest.approx(1000 * GIB) and not far.over(replace(machine, gpu_bytes=10**15))
    assert far.disk == pytest.approx(8 * 9 * 8192 * 10**10 - 1000 * GIB)


@pytest.mark.parametrize("gpu, host, binding", [(80, 10**6, "GPU"), (80, 200, "host")])
def test_the_longest_fits_and_one_token_more_does_not(gpu, host, binding):
    model, layer = made_up(90_000.0, 32)
    machine = Machine(8, gpu * GIB, host * GIB, 8)
    plan, bound = longest(model, layer, DS_CONFIG, machine)
    assert bound == binding and plan.tokens > 1000 and not plan.over(machine)
    assert plan_of(model, layer, DS_CONFIG, machine, plan.tokens + 1).over(machine) == binding


def test_the_command_says_where_the_bytes_go(measured, tmp_path, capsys, monkeypatch):
    # The second call needs the layers that the first has measured.
    monkeypatch.setattr(command, "Measuring", functools.cache(command.Measuring))
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


@pytest.mark.slow
def test_the_plan_depends_neither_on_a_compiler_nor_on_tritons_interpreter(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    CONFIG_MAPPING["llama"](**sizes, vocab_size=128, num_hidden_layers=2).to_json_file(tmp_path / "config.json")
    alst = {**OFFLOAD, "tiled_mlp_compute": True, "save_attention_output": False}
    (tmp_path / "ds.json").write_text(json.dumps({**DS_CONFIG, "sequence_parallel_size": 2, "alst": alst}))
    files = ["--model", str(tmp_path / "config.json"), "--ds_config", str(tmp_path / "ds.json")]
    # Without it, DeepSpeed warns at its import that it found no accelerator, on stdout unless it is hindered.
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    # No compiler and no op or kernel compiled before; and the tests' environment, with the interpreter.
    folders = {key: str(tmp_path / key) for key in ("HOME", "PATH", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")}
    without = {**folders, "CC": "/none", "CXX": "/none"}
    said = [
        subprocess.run(
            [sys.executable, "-m", "deepspeed_alst", "plan", *files, "--json"],
            env={**environment, **changed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for changed in ({"TRITON_INTERPRET": "0"}, {"TRITON_INTERPRET": "0", **without}, {"TRITON_INTERPRET": "1"})
    ]
    assert said[0] == said[1] == said[2] and json.loads(said[0])["longest"] > 0


def test_a_model_without_sdpa_is_an_error_in_one_line(tmp_path, capsys):
    CONFIG_MAPPING["gemma2"](num_hidden_layers=1).to_json_file(tmp_path / "config.json")
    assert main(["plan", "--model", str(tmp_path / "config.json"), "--num_gpus", "1"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ds_alst plan: model_type='gemma2': Gemma2ForCausalLM does not support")
