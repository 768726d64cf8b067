"""Keys that are nearly this package's: refused where it acts, told of in one line where it does not; others pass."""

import base64
import copy
import importlib
import json
import types
from pathlib import Path

import pytest

from deepspeed_alst import hooks, shard_dataloader
from deepspeed_alst.config.config_file import (
    TOP_KEYS,
    config_on_command_line,
    ignored,
    near_misses,
    read_config,
)
from deepspeed_alst.config.schema import parse
from deepspeed_alst.errors import ConfigError

ROOT = Path(__file__).parents[2]
SP = "sequence_parallel_size"
OFFLOAD = "activation_checkpoint_cpu_offload"
# What is written, and the key that is meant.
MISSES = {
    "sequence_paralel_size": SP,
    "Sequence_Parallel_Size": SP,
    "sequence-parallel-size": SP,
    "sequenceParallelSize": SP,
    "sequence_parallel_size ": SP,
    "\tsequence_parallel_size": SP,
    "seq_parallel_size": SP,
    "sequence_parallel": SP,
    "sequence_parallel_degree": SP,
    "sp_size": SP,
    "cp_size": SP,
    "context_parallel_size": SP,
    "ulysses_sequence_parallel_size": SP,
    "sequence_parallel_communication_data_type": "seq_parallel_communication_data_type",
    "alts": "alst",
    "ALST": "alst",
    " alst": "alst",
    "alst_config": "alst",
    "tiled_mlp": "alst.tiled_mlp_compute",
    "tile_mlp_compute": "tiled_mlp_compute",
    "tiled_mlp_compute ": "tiled_mlp_compute",
    "tiled-mlp-compute": "tiled_mlp_compute",
    "tiled_logit_loss": "alst.tiled_logits_loss",
    "tiled_loss": "alst.tiled_logits_loss",
    "activation_checkpointing_cpu_offload": OFFLOAD,
    "activation_checkpoint_offload": OFFLOAD,
    "activation_offloading": f"alst.{OFFLOAD}",
    "cpu_checkpointing": f"alst.{OFFLOAD}",
    "liger": "alst.liger_kernel",
    "use_liger_kernel": "alst.liger_kernel",
    "enable_liger_kernel": "alst.liger_kernel",
    "save_attention_outputs": "alst.save_attention_output",
    "pad_to_multiple": "alst.pad_to_multiple_of",
    "reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "check_model": "alst.check_model",
    "expandable_segment": "alst.expandable_segments",
}
PLACES = {
    "a mapping": ({"sequence_parallel": {"enabled": True, "size": 2}}, SP),
    "ALST's YAML": ({"model": {"type": "liger"}}, '"alst": {"liger_kernel": true}'),
    "in ZeRO's block": ({"zero_optimization": {SP: 2}}, f"zero_optimization.{SP}"),
    "deep in ZeRO's block": ({"zero_optimization": {"offload_param": {"sp_size": 2}}}, SP),
    "in a block that DeepSpeed does not check": ({"activation_checkpointing": {SP: 2}}, SP),
    "ALST's key in DeepSpeed's block": ({"activation_checkpointing": {OFFLOAD: True}}, OFFLOAD),
}
ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 5, "max_in_cpu": 1e9},
}
# In the form of files that people have: the Trainer's, a fine-tuning framework's, one for pretraining, other programs'.
STRANGERS = {
    "Trainer": {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "total_num_steps": "auto"}},
        "zero_optimization": ZERO3,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    },
    "fine-tuning": {
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "allgather_partitions": True, "round_robin_gradients": True},
        "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True, "profile": False},
    },
    "pretraining": {
        "train_micro_batch_size_per_gpu": 4,
        "communication_data_type": "fp32",
        "checkpoint": {"parallel_write": {"pipeline_stage": False}},
        "activation_checkpoint": {"number_checkpoints": 4},
        "comms_logger": {"enabled": True, "prof_all": True},
        "flops_profiler": {"enabled": True, "module_depth": -1},
        "tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "tensorboard": {"enabled": True, "job_name": "sequence_parallel_size"},
        "csv_monitor": {"enabled": False, "output_path": "logs"},
        "curriculum_learning": {"enabled": False, "params": {"min_difficulty": 8}},
        "compression_training": {"weight_quantization": {"shared_parameters": {}}},
    },
    "other frameworks": {
        "train_batch_size": 8,
        "tensor_model_parallel_size": 2,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "expert_parallel_size": 2,
        "data_parallel_world_size": 2,
        "dp_size": 2,
        "seq_length": 4096,
        "max_sequence_length": 4096,
        "checkpoint-activations": True,
        "gradient_checkpointing": True,
        "attention-config": [[["flash"], 2]],
        "model": {"type": "causal", "name_or_path": "gpt2"},
        "last": True,
        "salt": 1,
        "loss": "mean",
        "logits": True,
    },
    "off": {"sequence_parallel": False, "sp_size": 1, "use_liger_kernel": False, "tiled_mlp": {"enabled": False}},
}


@pytest.fixture
def initialize(capsys):
    """A gate in front of a stand-in for ``deepspeed.initialize``; returns what was printed on stderr."""

    def stand_in(model=None, mpu=None, config=None, mesh_param=None, config_params=None, args=None):
        return "untouched"

    module = types.SimpleNamespace(initialize=stand_in)
    hooks.hook_initialize(module)

    def call(ds_config, **arguments) -> str:
        assert module.initialize(config=copy.deepcopy(ds_config), **arguments) == "untouched"
        return capsys.readouterr().err

    return call


def refusal(ds_config) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(ds_config)
    return str(refused.value)


# --- where the package acts


@pytest.mark.parametrize("beside", [{SP: 2}, {"alst": {}}], ids=["SP", "block"])
@pytest.mark.parametrize("key", MISSES)
def test_a_near_miss_is_refused_with_the_key_that_is_meant(key, beside):
    line = refusal({**beside, key: 2})
    assert key.strip() in line and MISSES[key] in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("name", PLACES)
def test_a_key_in_another_place_is_refused_with_its_own(name):
    ds_config, words = PLACES[name]
    assert words in refusal({SP: 2, **ds_config})


def test_blanks_in_a_key_are_seen():
    assert refusal({SP: 2, "tiled_mlp_compute ": True}).startswith('"tiled_mlp_compute ": unknown key.')


@pytest.mark.parametrize("key", TOP_KEYS)
def test_alsts_own_names_work_at_the_top_level_and_in_one_place_only(key):
    assert parse({key: True}) == parse({"alst": {key: True}})
    assert parse({key: True, "alst": {"pad_to_multiple_of": 4}}).alst.pad_to_multiple_of == 4
    assert refusal({key: 5}).startswith(f"{key}: use true, false, or an object")
    assert refusal({key: {"tile_token": 5}}).startswith(f"{key}.tile_token: unknown key.")
    assert "leave one of them out" in refusal({key: True, "alst": {key: True}})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("reduce_bucket_size", "belongs in a block of the ds_config, as zero_optimization.reduce_bucket_size."),
        ("sp_size", f"Did you mean '{SP}', outside of the alst block?"),
        ("use_liger_kernel", "Did you mean 'liger_kernel'?"),
    ],
)
def test_a_key_of_another_place_in_the_block_is_told_where_it_belongs(key, words):
    assert words in refusal({"alst": {key: 1}})


# --- where it does not


@pytest.mark.parametrize("key", [key for key in MISSES])
def test_a_near_miss_alone_is_told_of_in_one_line(key, initialize):
    said = initialize({"train_batch_size": 2, key: 2})
    assert said.count("\n") == 1 and key.strip() in said and MISSES[key] in said


@pytest.mark.parametrize("name", PLACES)
def test_a_key_in_another_place_alone_is_told_of_in_one_line(name, initialize):
    ds_config, words = PLACES[name]
    assert initialize(ds_config).count("\n") == 1 and words in initialize(ds_config)


def test_several_are_told_of_in_one_line(initialize):
    slips = {"sp_size": 2, "liger": True, "seq_parallel_communication_data_type": "bf16"}
    said = initialize(slips)
    assert said.count("\n") == 1 and all(key in said for key in slips)


def test_nothing_is_said_of_a_program_that_has_sequence_parallelism_of_its_own(initialize):
    ds_config = {SP: 2, "seq_parallel_communication_data_type": "bf16"}
    assert initialize(ds_config, mpu=object()) == initialize(ds_config, mesh_param=(1, 2)) == ""
    assert initialize({**ds_config, "data_parallel_size": 1}) == ""


@pytest.mark.parametrize("name", STRANGERS)
def test_files_that_people_have_pass_without_a_word(name, initialize):
    assert initialize(STRANGERS[name]) == ""
    if name != "off":
        assert [*near_misses({SP: 2, "alst": {}, **STRANGERS[name]})] == []


def test_the_ready_files_pass_without_a_word():
    for path in sorted(each for each in (ROOT / "ds_configs").glob("*.json") if each.suffixes == [".json"]):
        assert [*near_misses(json.loads(path.read_text()))] == [], path


# --- what DeepSpeed knows


def words_of_deepspeed() -> set[str]:
    """The names in its constants, and the fields of its blocks."""
    found = set()
    for name in ("constants", "zero.config", "activation_checkpointing.config", "data_pipeline.constants", "config"):
        for key, value in vars(importlib.import_module(f"deepspeed.runtime.{name}")).items():
            if key.isupper() and isinstance(value, str) and value.isidentifier():
                found.add(value)
            found |= set(getattr(value, "model_fields", ()))
    return found


def test_no_word_of_deepspeeds_is_taken_for_ours():
    words = words_of_deepspeed()
    assert len(words) > 200
    ours = {SP, "seq_parallel_communication_data_type"}
    # Of its blocks, at the top level: DeepSpeed would ignore them.
    moved = {"cpu_checkpointing", "offload_activation", "reduce_bucket_size"}
    for word in words - ours:
        assert word in moved or [*near_misses({word: {"a": 1}})] == [], word
        assert [*near_misses({"zero_optimization": {word: 2}})] == [], word


# --- the file


TEXTS = [
    '{"alst": {}, /* a comment */ "bf16": {"enabled": true}, // another\n "a": 1, # and one\n}',
    '{"a": 1.0, "b": [1, 2,], "c": 5e8}',
    "a: 1\nb: {c: text}",
    '{"a": 1, "a": 2}',
    '{"a": {"b": 1, "b": 1}}',
    '{"a": ',
    "",
    "[1]",
    '{"a": NaN}',
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("form", ["file", "base64"])
def test_a_file_is_read_as_deepspeed_reads_it(text, form, tmp_path):
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    given = base64.urlsafe_b64encode(text.encode()).decode()
    if form == "file":
        given = str(tmp_path / "ds.json")
        Path(given).write_text(text)
    try:
        theirs = load_ds_config(given)
    except Exception:
        theirs = None
    if not isinstance(theirs, dict):
        with pytest.raises(ValueError):
            read_config(given)
    else:
        assert read_config(given) == theirs


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--deepspeed", "ds.json"], "ds.json"),
        (["--deepspeed=ds.hjson"], "ds.hjson"),
        (["--deepspeed", "--deepspeed_config", "ds.json"], "ds.json"),
        (["--deepspeed_config", "eyJhIjogMX0="], "eyJhIjogMX0="),
        (["--deepspeed"], None),
        (["--deepspeed", "--lr", "1"], None),
        ([], None),
    ],
)
def test_a_config_on_the_command_line_is_found_under_any_name(words, found):
    assert config_on_command_line(["train.py", *words]) == found


def test_a_file_with_comments_on_the_command_line_loads_sharded(tmp_path, monkeypatch):
    file = tmp_path / "ds.hjson"
    file.write_text('{"sequence_parallel_size": 2, "zero_optimization": {"stage": 3}, /* SP */}')
    monkeypatch.setattr("sys.argv", ["train.py", "--deepspeed", str(file)])
    integration = types.SimpleNamespace(is_deepspeed_zero3_enabled=lambda: False, HfDeepSpeedConfig=dict)
    hooks.load_sharded_under_zero3(integration)
    assert integration.kept_by_deepspeed_alst["zero_optimization"] == {"stage": 3}


def test_what_asks_for_nothing_is_not_told_of():
    assert ignored({SP: 1, "sequence_parallel": False, "cp_size": 1, "liger": None, "alts": {"enabled": False}}) == []


def test_shard_dataloader_refuses_a_ds_config_whose_key_for_it_is_misspelt(tmp_path):
    path = tmp_path / "ds.json"
    for ds_config in ({"sequence_paralel_size": 2}, {"alts": {"tiled_mlp_compute": True}}):
        path.write_text(json.dumps(ds_config))
        for given in (ds_config, str(path)):
            with pytest.raises(ConfigError, match=f"{next(iter(ds_config))}: .*Did you mean"):
                shard_dataloader([], types.SimpleNamespace(config=given))
    loader = []
    assert shard_dataloader(loader, types.SimpleNamespace(config={"train_batch_size": 2})) is loader
