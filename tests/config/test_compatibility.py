"""Each row of the compatibility table: the ds_config that asks for it, what DeepSpeed makes of it, and the verdict."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from deepspeed_alst.config.compatibility import REFUSED, check_features, value_at
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import shown

BY_NAME = {feature.name: feature for feature in REFUSED}
# Trained and compared with SP 1 in tests/sequence_parallel/test_features.py.
RIGHT = (
    "fp16",
    "bf16",
    "gradient clipping",
    "optimizer offload to CPU",
    "parameter offload to CPU",
    "reduce_scatter off",
    "contiguous_gradients off",
    "overlap_comm",
    "fp32 gradient accumulation",
    "Muon",
)


@dataclass(frozen=True)
class Example:
    """A ds_config that asks for one feature, and what of DeepSpeed's parsed config shows that DeepSpeed was asked."""

    ds_config: dict[str, Any]
    read: Callable[[DeepSpeedConfig], Any] | None = None
    """None: not in DeepSpeedConfig."""


def zero(stage: int = 3, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def optimizer(name: str) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": {"lr": 1e-3}}}


EXAMPLES = {
    "fp16": Example({"fp16": {"enabled": True}}, lambda c: c.float16_config.enabled),
    "bf16": Example({"bf16": {"enabled": True}}, lambda c: c.bfloat16_config.enabled),
    "torch autocast": Example(
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, lambda c: c.torch_autocast_enabled
    ),
    "gradient clipping": Example({"gradient_clipping": 0.5}, lambda c: c.gradient_clipping == 0.5),
    "prescale_gradients": Example({"prescale_gradients": True}, lambda c: c.prescale_gradients),
    "gradient_predivide_factor": Example(
        {"gradient_predivide_factor": 2.0}, lambda c: c.gradient_predivide_factor == 2.0
    ),
    "gradient_allreduce_op": Example({"gradient_allreduce_op": "sum"}, lambda c: c.gradient_allreduce_op == "sum"),
    "optimizer offload to CPU": Example(
        zero(2, offload_optimizer={"device": "cpu"}),
        lambda c: c.zero_config.offload_optimizer and c.zero_config.offload_optimizer.device == "cpu",
    ),
    "optimizer offload to NVMe": Example(
        zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}),
        lambda c: c.zero_config.offload_optimizer and c.zero_config.offload_optimizer.device == "nvme",
    ),
    "parameter offload to CPU": Example(
        zero(3, offload_param={"device": "cpu"}),
        lambda c: c.zero_config.offload_param and c.zero_config.offload_param.device == "cpu",
    ),
    "parameter offload to NVMe": Example(
        zero(3, offload_param={"device": "nvme", "nvme_path": "/tmp"}),
        lambda c: c.zero_config.offload_param and c.zero_config.offload_param.device == "nvme",
    ),
    "reduce_scatter off": Example(zero(2, reduce_scatter=False), lambda c: not c.zero_config.reduce_scatter),
    "contiguous_gradients off": Example(
        zero(2, contiguous_gradients=False), lambda c: not c.zero_config.contiguous_gradients
    ),
    "overlap_comm": Example(zero(2, overlap_comm=True), lambda c: c.zero_config.overlap_comm),
    "round_robin_gradients": Example(
        zero(2, round_robin_gradients=True), lambda c: c.zero_config.round_robin_gradients
    ),
    "fp32 gradient accumulation": Example(
        {"data_types": {"grad_accum_dtype": "fp32"}}, lambda c: c.grad_accum_dtype == "fp32"
    ),
    "communication_data_type": Example(
        {"communication_data_type": "bf16"}, lambda c: c.communication_data_type is not None
    ),
    "hpZ (ZeRO++)": Example(zero(3, zero_hpz_partition_size=2), lambda c: c.zero_config.zero_hpz_partition_size == 2),
    "qwZ (ZeRO++)": Example(zero(3, zero_quantized_weights=True), lambda c: c.zero_config.zero_quantized_weights),
    "qwZ for frozen weights (ZeRO++)": Example(
        zero(3, zero_quantized_nontrainable_weights=True), lambda c: c.zero_config.zero_quantized_nontrainable_weights
    ),
    "qgZ (ZeRO++)": Example(zero(3, zero_quantized_gradients=True), lambda c: c.zero_config.zero_quantized_gradients),
    "ZenFlow": Example(zero(2, zenflow={"topk_ratio": 0.1}), lambda c: c.zero_config.zenflow is not None),
    "SuperOffload": Example(
        zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
        lambda c: c.zero_config.offload_optimizer and c.zero_config.offload_optimizer.super_offload,
    ),
    "AutoTP": Example({"tensor_parallel": {"autotp_size": 2}}, lambda c: c.tensor_parallel_config.autotp_size == 2),
    "AutoEP": Example(
        {"expert_parallel": {"enabled": True, "autoep_size": 2}}, lambda c: c.expert_parallel_config.enabled
    ),
    "pipeline parallelism": Example({"pipeline": {"stages": 2}}, lambda c: c.pipeline["stages"] == 2),
    "Muon": Example(optimizer("Muon"), lambda c: c.optimizer_name == "muon"),
    "Muon on ZeRO 1 with bf16 gradients accumulated in fp32": Example(
        {**optimizer("Muon"), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **zero(1)},
        lambda c: c.optimizer_name == "muon" and c.grad_accum_dtype == "fp32",
    ),
    "DeepCompile": Example({"compile": {"deepcompile": True}}, lambda c: c.compile_config.deepcompile),
    "AutoSP": Example({"compile": {"passes": ["autosp"]}}, lambda c: "autosp" in (c.compile_config.passes or ())),
    "checkpoint writer": Example(
        {"checkpoint": {"writer": {"type": "fast"}}}, lambda c: c.checkpoint_config.get("writer") is not None
    ),
    "data_efficiency": Example({"data_efficiency": {"enabled": True}}, lambda c: c.data_efficiency_enabled),
    "hybrid_engine": Example({"hybrid_engine": {"enabled": True}}, lambda c: c.hybrid_engine.enabled),
    "autotuning": Example({"autotuning": {"enabled": True}}, lambda c: c.autotuning_config.enabled),
    "unmanaged gradient accumulation": Example(
        {"managed_gradient_accumulation": False}, lambda c: not c.managed_gradient_accumulation
    ),
    "data_parallel_size mesh": Example({"data_parallel_size": 2, "sequence_parallel_size": 2}),
}
# What DeepSpeed 0.19.8 has removed: it refuses the key by name.
REMOVED = {
    "LoCo (ZeRO++)": zero(3, zeropp_loco_param={"err_beta": 0.8, "reset_T": 1024}),
    "MiCS": zero(3, mics_shard_size=2),
    "sparse gradients": {"sparse_gradients": True},
    "curriculum_learning": {"curriculum_learning": {"enabled": True}},
}

# Blocks that say no: what a program with a template of a ds_config leaves in it.
FALSY = [
    {"torch_autocast": {"enabled": False, "dtype": "bfloat16"}},
    {"prescale_gradients": False},
    {"prescale_gradients": None},
    {"gradient_predivide_factor": 1.0},
    {"gradient_predivide_factor": 1},
    {"gradient_predivide_factor": None},
    {"gradient_allreduce_op": "mean"},
    {"gradient_allreduce_op": "MEAN"},
    zero(3, offload_optimizer={"device": "none"}, offload_param={"device": "none"}),
    zero(3, offload_optimizer=None, offload_param=None),
    zero(3, offload_optimizer={"device": "cpu", "super_offload": False}),
    zero(3, zero_hpz_partition_size=1),
    zero(3, zero_hpz_partition_size=0),
    zero(3, zero_quantized_weights=False, zero_quantized_nontrainable_weights=False, zero_quantized_gradients=False),
    zero(2, round_robin_gradients=False),
    zero(0, round_robin_gradients=True),
    zero(3, round_robin_gradients=True),
    zero(2, zero_hpz_partition_size=8, zero_quantized_weights=True),
    zero(2, offload_param={"device": "nvme", "nvme_path": "/nvme"}),
    {"checkpoint": {"writer": None, "tag_validation": "Warn"}},
    zero(3, zeropp_loco_param=None),
    zero(3, zenflow=None),
    {"zero_optimization": True},
    {"zero_optimization": None},
    {"tensor_parallel": {"autotp_size": 0}},
    {"tensor_parallel": {"autotp_size": 1}},
    {"tensor_parallel": {}},
    {"expert_parallel": {"enabled": False, "autoep_size": 1}},
    {"expert_parallel": {}},
    {"pipeline": {}},
    {"pipeline": None},
    optimizer("AdamW"),
    optimizer("adam"),
    {"optimizer": {}},
    {"optimizer": {"type": None}},
    {"compile": {"deepcompile": False, "passes": None}},
    {"compile": {"deepcompile": False, "passes": ["z1"]}},
    {"compile": {}},
    {"data_efficiency": {"enabled": False, "data_sampling": {"enabled": False}}},
    {"hybrid_engine": {"enabled": False}},
    {"autotuning": {"enabled": False, "fast": True}},
    {"managed_gradient_accumulation": True},
]


def asked_for(ds_config: Mapping[str, Any]) -> list[str]:
    return [feature.name for feature in REFUSED if feature.asked(ds_config)]


def problems_of(ds_config: Mapping[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        check_features(ds_config)
    return str(refused.value).splitlines()


def read_by_deepspeed(ds_config: Mapping[str, Any]) -> DeepSpeedConfig:
    return DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **ds_config})


# --- the table itself


def test_every_row_has_a_name_of_its_own_and_an_example():
    assert len(BY_NAME) == len(REFUSED)
    assert set(EXAMPLES) == set(BY_NAME) | set(RIGHT)


def test_a_plain_config_asks_for_nothing():
    for ds_config in ({}, {"sequence_parallel_size": 2, "train_micro_batch_size_per_gpu": 1}, zero(0), zero(3)):
        assert asked_for(ds_config) == []
        check_features(ds_config)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_asks_for_its_row_and_for_no_other(name):
    assert asked_for(EXAMPLES[name].ds_config) == [name] * (name in BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_refused_feature_is_refused_with_its_path_its_value_and_its_sentence(name):
    feature, ds_config = BY_NAME[name], EXAMPLES[name].ds_config
    (line,) = problems_of({"sequence_parallel_size": 2, **ds_config})
    value = value_at(ds_config, feature.path)
    assert value is not None, f"{feature.path} is not where this feature is asked for in {ds_config}"
    assert line == f"{feature.path}={shown(value)} ({name}): {feature.refusal}."


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_feature_is_let_through(name):
    check_features({"sequence_parallel_size": 2, **EXAMPLES[name].ds_config})


def test_several_refused_features_are_reported_at_once_a_line_each_in_the_order_of_the_table():
    names = ["torch autocast", "prescale_gradients", "qgZ (ZeRO++)", "AutoTP", "AutoEP", "data_parallel_size mesh"]
    ds_config: dict[str, Any] = {"bf16": {"enabled": True}, "gradient_clipping": 1.0}
    for name in names:
        ds_config |= EXAMPLES[name].ds_config
    lines = problems_of(ds_config)
    assert [line.split("(", 1)[1].split("): ")[0] for line in lines] == names


def test_a_refused_feature_says_what_to_do_instead():
    for name in BY_NAME:
        assert any(verb in BY_NAME[name].refusal for verb in ("remove", "use ")), name


@pytest.mark.parametrize("ds_config", FALSY, ids=repr)
def test_a_feature_that_is_switched_off_is_not_refused(ds_config):
    check_features(ds_config)


# --- against DeepSpeed's source: does DeepSpeed read what the row reads?


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.read])
def test_deepspeed_reads_the_feature_where_the_row_does(name):
    example = EXAMPLES[name]
    assert example.read(read_by_deepspeed(example.ds_config)), f"DeepSpeed does not see {name} in {example.ds_config}"
    assert not example.read(read_by_deepspeed({})), f"DeepSpeed has {name} on by default"


@pytest.mark.parametrize("name", REMOVED)
def test_deepspeed_refuses_a_feature_that_it_has_removed(name):
    with pytest.raises(DeepSpeedConfigError, match="removed"):
        read_by_deepspeed(REMOVED[name])


def test_deepspeed_makes_a_mesh_of_data_parallel_size():
    # Not in DeepSpeedConfig: deepspeed.initialize reads the two keys by itself.
    import deepspeed

    source = inspect.getsource(inspect.unwrap(deepspeed.initialize))
    assert '"sequence_parallel_size" in config and "data_parallel_size" in config' in source


@pytest.mark.parametrize(
    ("name", "ds_config"),
    [
        ("gradient_allreduce_op", {"gradient_allreduce_op": "Sum"}),
        ("ZenFlow", zero(2, zenflow={})),
        ("ZenFlow", zero(2, zenflow={"topk_ratio": 0.1, "overlap_step": True})),
        (
            "Muon on ZeRO 1 with bf16 gradients accumulated in fp32",
            {**optimizer("MUON"), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **zero(1)},
        ),
        ("hpZ (ZeRO++)", zero(3, zero_hpz_partition_size="2")),
        ("unmanaged gradient accumulation", {"managed_gradient_accumulation": None}),
        ("unmanaged gradient accumulation", {"managed_gradient_accumulation": 0}),
    ],
    ids=repr,
)
def test_another_spelling_that_deepspeed_reads_as_the_feature_is_refused_too(name, ds_config):
    assert EXAMPLES[name].read(read_by_deepspeed(ds_config))
    assert name in asked_for(ds_config)


@pytest.mark.parametrize(
    "keys",
    [
        {"zero_hpz_partition_size": "auto"},
        {"zero_quantized_weights": "auto"},
        {"zero_quantized_gradients": "auto"},
        {"zenflow": "auto"},
    ],
    ids=repr,
)
def test_auto_in_the_zero_block_is_deepspeeds_default_and_not_refused(keys):
    # DeepSpeedConfigModel drops values that are "auto".
    (key,) = keys
    default = getattr(read_by_deepspeed(zero(3)).zero_config, key)
    assert getattr(read_by_deepspeed(zero(3, **keys)).zero_config, key) == default
    check_features(zero(3, **keys))


@pytest.mark.parametrize("block", ["curriculum_learning", "random_ltd"])
def test_data_efficiency_is_seen_where_only_its_inner_switch_is_on(block):
    # DeepSpeed's engine asks the inner switches and never data_efficiency.enabled.
    where, inner = (
        ("data_sampling", {"enabled": True, "curriculum_metrics": {}})
        if block == "curriculum_learning"
        else ("data_routing", {"enabled": True, "total_layer_num": 2, "random_ltd_layer_num": 1})
    )
    ds_config = {"data_efficiency": {"enabled": False, where: {"enabled": False, block: inner}}}
    assert read_by_deepspeed(ds_config).data_efficiency_config[where][block]["enabled"]
    assert asked_for(ds_config) == ["data_efficiency"]
