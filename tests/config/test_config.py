"""The keys of a ds_config that are this package's: what is accepted, and what an error says."""

import json

import pytest
import torch
from pydantic import ValidationError

from deepspeed_alst.config.compatibility import check_world
from deepspeed_alst.config.config_file import BLOCK_KEYS, TOP_KEYS
from deepspeed_alst.config.schema import AlstBlockConfig, AlstConfig, parse
from deepspeed_alst.errors import AlstError, ConfigError

DEFAULTS = {
    "pad_to_multiple_of": "auto",
    "expandable_segments": None,
    "reduction": {"slice_bytes": 64 << 20, "bucket_size": None},
    "tiled_mlp_compute": None,
    "tiled_logits_loss": "auto",
    "liger_kernel": "auto",
    "activation_checkpoint_cpu_offload": None,
    "check_model": True,
    "save_attention_output": "auto",
    "memory_lean_layer": None,
}


def problems_of(ds_config) -> list[str]:
    """The lines of the ConfigError that a ds_config is refused with."""
    with pytest.raises(ConfigError) as refused:
        parse(ds_config)
    return str(refused.value).splitlines()


def alst(**keys) -> dict:
    return {"sequence_parallel_size": 2, "alst": keys}


# --- what is accepted


def test_an_empty_ds_config_gives_every_default():
    config = parse({})
    assert config.sequence_parallel_size == 1
    assert config.seq_parallel_communication_data_type == "fp32"
    assert config.alst.model_dump() == DEFAULTS
    assert config == parse({"alst": {}}) == AlstConfig()


def test_keys_of_deepspeed_are_none_of_our_business():
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1.25e8},
        "communication_data_type": "fp16",
        "data_parallel_size": 2,
        "gradient_clipping": 1.0,
    }
    assert parse(ds_config) == AlstConfig()


def test_every_key_has_a_docstring_of_its_own():
    for model in (AlstConfig, AlstBlockConfig):
        described = [field.description for field in model.model_fields.values()]
        assert all(described) and len(set(described)) == len(described)


def test_the_defaults_in_this_test_name_every_key():
    assert set(BLOCK_KEYS) == set(DEFAULTS) == set(AlstBlockConfig.model_fields)


@pytest.mark.parametrize(
    ("spelling", "dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("FP32", "fp32"), ("Bf16", "bf16")]
)
def test_the_reduction_dtype_is_read_in_any_case(spelling, dtype):
    assert parse({"seq_parallel_communication_data_type": spelling}).seq_parallel_communication_data_type == dtype


@pytest.mark.parametrize("spelling", ["fp32", "bf16", "fp16", "BF16", "bfp16", "bfloat16", "torch.bfloat16", "float32"])
def test_a_spelling_of_the_dtype_is_accepted_exactly_where_deepspeed_accepts_it(spelling):
    # DeepSpeed reads the same key after us, and refuses what it does not know.
    from deepspeed.runtime.config import get_communication_data_type

    key = "seq_parallel_communication_data_type"
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    try:
        theirs = get_communication_data_type({key: spelling}, key, "fp32")
    except ValueError:
        assert problems_of({key: spelling})
    else:
        assert names[parse({key: spelling}).seq_parallel_communication_data_type] == theirs


@pytest.mark.parametrize("sp_size", [1, 2, 3, 7, 8])
def test_auto_pads_to_256_tokens_per_rank(sp_size):
    assert parse({"sequence_parallel_size": sp_size}).padding_multiple() == 256 * sp_size
    spelt_out = {"sequence_parallel_size": sp_size, "alst": {"pad_to_multiple_of": "auto"}}
    assert parse(spelt_out).padding_multiple() == 256 * sp_size


@pytest.mark.parametrize(("sp_size", "multiple"), [(1, 1), (1, 63), (2, 2), (3, 63), (4, 1000)])
def test_a_multiple_of_the_sp_degree_is_taken_as_it_is(sp_size, multiple):
    ds_config = {"sequence_parallel_size": sp_size, "alst": {"pad_to_multiple_of": multiple}}
    assert parse(ds_config).padding_multiple() == multiple


@pytest.mark.parametrize("value", [True, False])
def test_expandable_segments_can_be_said_either_way(value):
    assert parse(alst(expandable_segments=value)).alst.expandable_segments is value


@pytest.mark.parametrize(
    ("value", "tile_bytes"), [(True, "auto"), ({}, "auto"), ({"tile_bytes": 5e8}, 500_000_000), (False, None)]
)
def test_tiled_mlp_compute_is_on_off_or_an_object(value, tile_bytes):
    found = parse(alst(tiled_mlp_compute=value)).alst.tiled_mlp_compute
    assert (found and found.tile_bytes) == tile_bytes


@pytest.mark.parametrize(
    ("value", "at_sp2", "at_sp1"),
    [
        ("auto", 2**30, None),
        (True, 2**30, 2**30),
        ("torch", 2**30, 2**30),
        ("triton", 2**30, 2**30),
        ({"backend": "triton", "tile_bytes": 7}, 7, 7),
        ({"tile_bytes": 7}, 7, 7),
        (False, None, None),
    ],
)
def test_the_loss_is_tiled_where_sequences_are_split_or_where_it_is_asked_for(value, at_sp2, at_sp1):
    for sp_size, expected in ((2, at_sp2), (1, at_sp1)):
        found = parse({"sequence_parallel_size": sp_size, "alst": {"tiled_logits_loss": value}}).tiled_loss()
        assert (found and found.tile_bytes) == expected


@pytest.mark.parametrize(
    ("value", "backend"), [(True, "auto"), ("torch", "torch"), ("triton", "triton"), ({"backend": "triton"}, "triton")]
)
def test_what_makes_a_tiles_loss_is_a_value_or_a_key_of_its_own(value, backend):
    assert parse(alst(tiled_logits_loss=value)).tiled_loss().backend == backend


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("tiled_mlp_compute", "auto", "alst.tiled_mlp_compute: use true, false, or an object"),
        ("tiled_mlp_compute", None, "alst.tiled_mlp_compute: use true, false, or an object"),
        ("tiled_mlp_compute", 1, "alst.tiled_mlp_compute: use true, false, or an object"),
        (
            "tiled_mlp_compute",
            {"tile_token": 3},
            "alst.tiled_mlp_compute.tile_token: unknown key. Did you mean 'tile_t",
        ),
        ("tiled_mlp_compute", {"tile_tokens": 0}, "alst.tiled_mlp_compute.tile_tokens: Input should be greater"),
        (
            "tiled_mlp_compute",
            {"tile_bytes": 0},
            "alst.tiled_mlp_compute.tile_bytes: must be a positive number of byte",
        ),
        ("tiled_mlp_compute", {"tile_bytes": True}, "alst.tiled_mlp_compute.tile_bytes: must be a positive number of"),
        (
            "tiled_mlp_compute",
            {"fp32_accumulation": 1},
            "alst.tiled_mlp_compute.fp32_accumulation: Input should be a v",
        ),
        (
            "tiled_logits_loss",
            "ligr",
            'alst.tiled_logits_loss: use true, false, "auto", "torch", "triton", "liger", or',
        ),
        (
            "tiled_logits_loss",
            {"backend": "tritn"},
            "alst.tiled_logits_loss.backend: Input should be 'auto', 'torch', 't",
        ),
        ("tiled_logits_loss", 0, 'alst.tiled_logits_loss: use true, false, "auto", "torch", "triton", "lig'),
        ("tiled_logits_loss", None, 'alst.tiled_logits_loss: use true, false, "auto", "torch", "triton", "lig'),
        ("tiled_logits_loss", {"tile_byte": 9}, "alst.tiled_logits_loss.tile_byte: unknown key. Did you mean 'tile_b"),
        ("tiled_logits_loss", {"tile_bytes": "1G"}, "alst.tiled_logits_loss.tile_bytes: "),
    ],
)
def test_tiles_that_are_said_wrongly_are_refused_in_one_line(key, value, sentence):
    (line,) = problems_of(alst(**{key: value}))
    assert line.startswith(sentence)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, 'alst.liger_kernel: use true, false, "auto", or an object of rms_norm, rope, swiglu, geglu,'),
        (1, 'alst.liger_kernel: use true, false, "auto", or an object of rms_norm, '),
        ("on", 'alst.liger_kernel: use true, false, "auto", or an object of rms_norm, '),
        ({"rope": 1}, "alst.liger_kernel.rope: Input should be a valid boolean (got 1)."),
        ({"rope": "auto"}, 'alst.liger_kernel.rope: Input should be a valid boolean (got "auto").'),
        ({"rmsnorm": True}, "alst.liger_kernel.rmsnorm: unknown key. Did you mean 'rms_norm'?"),
        ({"cross_entropy": True}, "alst.liger_kernel.cross_entropy: unknown key. Did you mean 'fused_linear_cross_ent"),
    ],
)
def test_parts_of_liger_that_are_said_wrongly_are_refused_in_one_line(value, sentence):
    (line,) = problems_of(alst(liger_kernel=value))
    assert line.startswith(sentence)


@pytest.mark.parametrize(
    "keys",
    [
        {"tiled_logits_loss": False, "liger_kernel": {"fused_linear_cross_entropy": True}},
        {"tiled_logits_loss": "triton", "liger_kernel": {"fused_linear_cross_entropy": True}},
        {"tiled_logits_loss": "liger", "liger_kernel": {"fused_linear_cross_entropy": False}},
    ],
    ids=str,
)
def test_a_loss_by_liger_that_two_keys_contradict_is_refused(keys):
    (line,) = problems_of(alst(**keys))
    assert line.startswith("alst.liger_kernel: fused_linear_cross_entropy=") and "tiled_logits_loss" in line


@pytest.mark.parametrize(
    ("keys", "backend"),
    [
        ({"liger_kernel": True}, "auto"),
        ({"liger_kernel": {"fused_linear_cross_entropy": True}}, "auto"),
        ({"liger_kernel": "auto"}, None),
        ({"liger_kernel": {"rope": True}}, None),
        ({"liger_kernel": {"fused_linear_cross_entropy": False}}, None),
        # What is said of the loss itself goes before what is said of all.
        ({"liger_kernel": True, "tiled_logits_loss": False}, None),
        ({"liger_kernel": True, "tiled_logits_loss": "torch"}, "torch"),
        ({"liger_kernel": False, "tiled_logits_loss": "liger"}, "liger"),
    ],
    ids=str,
)
def test_ligers_loss_switches_tiles_on_without_sequence_parallelism(keys, backend):
    loss = parse({"alst": keys}).tiled_loss()
    assert (loss and loss.backend) == backend


def test_a_config_is_frozen_at_both_levels():
    config = parse(alst())
    with pytest.raises(ValidationError, match="frozen"):
        config.sequence_parallel_size = 4
    with pytest.raises(ValidationError, match="frozen"):
        config.alst.pad_to_multiple_of = 4


def test_parsing_leaves_the_ds_config_as_it_was():
    ds_config = {"sequence_parallel_size": 2, "seq_parallel_communication_data_type": "BF16", "alst": {"reduction": {}}}
    before = repr(ds_config)
    parse(ds_config)
    assert repr(ds_config) == before


# --- what is refused


@pytest.mark.parametrize("value", [0, -1, 2.0, 1.5, "2", "auto", True, None, [2]])
def test_an_sp_degree_that_is_no_positive_integer_is_refused(value):
    (line,) = problems_of({"sequence_parallel_size": value})
    assert line.startswith("sequence_parallel_size: Input should be ")
    assert line.endswith(f"(got {json.dumps(value)}).")


@pytest.mark.parametrize("value", ["fp64", "", "auto", 16, None, True, [], {}])
def test_a_dtype_that_gradients_cannot_be_summed_in_is_refused_with_the_ones_that_do(value):
    (line,) = problems_of({"seq_parallel_communication_data_type": value})
    says = "seq_parallel_communication_data_type: Input should be 'fp32', 'bf16' or 'fp16'"
    assert line == f"{says} (got {json.dumps(value)})."


@pytest.mark.parametrize("value", [0, -1, "foo", 2.5, True, False, None, [], {}])
def test_a_padding_that_is_no_positive_integer_is_refused_in_one_line(value):
    lines = problems_of(alst(pad_to_multiple_of=value))
    assert len(lines) == 1, lines
    assert lines[0].startswith("alst.pad_to_multiple_of: ") and lines[0].endswith(f"(got {json.dumps(value)}).")
    assert '"auto"' in lines[0], "the way out is missing"


@pytest.mark.parametrize(("sp_size", "multiple", "fitting"), [(2, 511, 512), (3, 1, 3), (7, 1000, 1001), (8, 12, 16)])
def test_a_padding_that_the_sp_degree_does_not_divide_is_refused_with_the_next_that_fits(sp_size, multiple, fitting):
    (line,) = problems_of({"sequence_parallel_size": sp_size, "alst": {"pad_to_multiple_of": multiple}})
    assert line == (
        f"alst.pad_to_multiple_of={multiple} is not a multiple of sequence_parallel_size={sp_size}. "
        f'Use {fitting}, or "auto".'
    )
    assert parse({"sequence_parallel_size": sp_size, "alst": {"pad_to_multiple_of": fitting}})


@pytest.mark.parametrize("given, read", [(5e8, 500_000_000), (1, 1), ("auto", "auto"), (None, None)])
def test_a_bucket_size_is_a_number_as_json_writes_it_or_auto(given, read):
    assert parse(alst(reduction={"bucket_size": given})).alst.reduction.bucket_size == read


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("slice_bytes", "bucket_size") for value in (0, -1, 2.5, True, "many", [], float("nan"))]
    + [("slice_bytes", "auto"), ("slice_bytes", 100)],
)
def test_a_slice_or_a_bucket_that_is_no_number_is_refused(key, value):
    (line,) = problems_of(alst(reduction={key: value}))
    assert line.startswith(f"alst.reduction.{key}: ") and line.endswith(f"(got {json.dumps(value)}).")


@pytest.mark.parametrize("value", ["auto", 2, "maybe", [], {}])
def test_expandable_segments_that_are_neither_on_nor_off_are_refused(value):
    (line,) = problems_of(alst(expandable_segments=value))
    assert line.startswith("alst.expandable_segments: ") and line.endswith(f"(got {json.dumps(value)}).")


LEAN = {"chunk_tokens": 8192, "tile_tokens": 2048, "key_block": 65536, "min_tokens": 0}


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (True, LEAN),
        ({}, LEAN),
        (False, None),
        ({"tile_tokens": 7}, LEAN | {"tile_tokens": 7}),
        ("auto", LEAN | {"min_tokens": 16385}),
    ],
)
def test_memory_lean_layers_are_on_off_or_an_object(value, read):
    block = parse(alst(memory_lean_layer=value)).alst.memory_lean_layer
    assert (block and block.model_dump()) == read


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (0, ': use true, false, "auto", or an object of chunk_tokens, tile_tokens, key_block, min_tokens (got 0).'),
        ({"chunk_tokens": 0}, ".chunk_tokens: Input should be greater than or equal to 1 (got 0)."),
        ({"tile_tokens": "7"}, '.tile_tokens: Input should be a valid integer (got "7").'),
    ],
)
def test_other_values_of_memory_lean_layers_are_refused(value, problem):
    assert problems_of(alst(memory_lean_layer=value)) == [f"alst.memory_lean_layer{problem}"]


OFFLOAD = {"nvme_path": None, "host_budget": "auto", "keep_last": None, "packing": False}


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (True, OFFLOAD),
        ({}, OFFLOAD),
        (False, None),
        ({"nvme_path": "/mnt/nvme", "host_budget": 1e11}, OFFLOAD | {"nvme_path": "/mnt/nvme", "host_budget": 10**11}),
        ({"keep_last": 0, "host_budget": "auto"}, OFFLOAD | {"keep_last": 0}),
        *(({"packing": each}, OFFLOAD | {"packing": each}) for each in ("lossless", "auto", False)),
    ],
)
def test_offload_is_on_off_or_an_object(value, read):
    assert (
        parse(alst(activation_checkpoint_cpu_offload=value)).alst.model_dump()["activation_checkpoint_cpu_offload"]
        == read
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, ": use true, false, or an object of nvme_path, host_budget, keep_last, packing (got 0)."),
        ("auto", ': use true, false, or an object of nvme_path, host_budget, keep_last, packing (got "auto").'),
        ({"nvme_path": ""}, '.nvme_path: String should have at least 1 character (got "").'),
        ({"nvme_path": 5}, ".nvme_path: Input should be a valid string (got 5)."),
        ({"host_budget": 0}, '.host_budget: must be a positive number of bytes, or "auto" (got 0).'),
        ({"host_budget": "1TB"}, '.host_budget: must be a positive number of bytes, or "auto" (got "1TB").'),
        ({"keep_last": -1}, ".keep_last: Input should be greater than or equal to 0 (got -1)."),
        ({"keep_last": True}, ".keep_last: Input should be a valid integer (got true)."),
        ({"packing": True}, '.packing: use "lossless", "auto", or false (got true).'),
        ({"nvme": "/x"}, ".nvme: unknown key. Did you mean 'nvme_path'?"),
    ],
)
def test_offload_that_is_said_wrongly_is_refused_in_one_line(value, words):
    assert problems_of(alst(activation_checkpoint_cpu_offload=value)) == [
        f"alst.activation_checkpoint_cpu_offload{words}"
    ]


@pytest.mark.parametrize("value", [0, 1, "yes", {}, None])
def test_save_attention_output_is_true_false_or_auto(value):
    (line,) = problems_of(alst(save_attention_output=value))
    assert line == f'alst.save_attention_output: use true, false, or "auto" (got {json.dumps(value)}).'
    assert parse(alst(save_attention_output=True)).alst.save_attention_output is True
    assert parse(alst(save_attention_output=False)).alst.save_attention_output is False


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"slice_bytes": 5000}, "slice_bytes: belongs in a block of the ds_config, as alst.reduction.slice_bytes."),
        (
            {"alst": {"bucket_size": 5}},
            "alst.bucket_size: belongs in a block of the ds_config, as alst.reduction.bucket_size.",
        ),
        (
            {"alst": {"tile_bytes": 5}},
            "alst.tile_bytes: belongs in a block of the ds_config, as alst.tiled_mlp_compute.tile_bytes or "
            "alst.tiled_logits_loss.tile_bytes.",
        ),
        ({"alst": {"reduction": True}}, "alst.reduction: must be an object of slice_bytes, bucket_size (got true)."),
    ],
)
def test_keys_of_inner_blocks_in_the_wrong_place_are_told_where_they_belong(config, line):
    assert problems_of(config) == [line]


@pytest.mark.parametrize("value", [True, None, 5, []])
def test_an_alst_block_that_is_no_object_is_refused(value):
    (line,) = problems_of({"alst": value})
    assert line.startswith("alst: ") and line.endswith(f"(got {json.dumps(value)}).")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("tiled_mlp", "tiled_mlp_compute"),
        ("pad_to_multiple", "pad_to_multiple_of"),
        ("tiled_logit_loss", "tiled_logits_loss"),
        ("liger_kernels", "liger_kernel"),
        ("activation_checkpoint_offload", "activation_checkpoint_cpu_offload"),
    ],
)
def test_an_unknown_key_of_the_block_is_refused_with_the_nearest_known_one(key, nearest):
    assert problems_of(alst(**{key: True})) == [f"alst.{key}: unknown key. Did you mean '{nearest}'?"]


def test_a_key_of_the_top_level_in_the_block_is_told_where_it_belongs():
    (line,) = problems_of({"alst": {"sequence_parallel_size": 2}})
    assert line == (
        "alst.sequence_parallel_size: belongs at the top level of the ds_config, as sequence_parallel_size."
    )


@pytest.mark.parametrize("key", ["zzz", "interval", "int8", "literal[x"])
def test_an_unknown_key_that_resembles_none_is_refused_by_its_own_name(key):
    assert problems_of(alst(**{key: 1})) == [
        f"alst.{key}: unknown key. Known are {', '.join(AlstBlockConfig.model_fields)}."
    ]


@pytest.mark.parametrize("key", [key for key in AlstBlockConfig.model_fields if key not in TOP_KEYS])
def test_a_key_of_the_block_at_the_top_level_is_told_where_it_belongs(key):
    assert problems_of({key: DEFAULTS[key]}) == [f"{key}: belongs in a block of the ds_config, as alst.{key}."]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sequence_paralel_size", "sequence_parallel_size"),
        ("seq_parallel_size", "sequence_parallel_size"),
        ("sequence_parallel_communication_data_type", "seq_parallel_communication_data_type"),
        ("seq_parallel_comm_data_type", "seq_parallel_communication_data_type"),
    ],
)
def test_a_misspelt_key_of_ours_at_the_top_level_is_refused_where_deepspeed_would_ignore_it(key, nearest):
    assert problems_of({key: 2}) == [f"{key}: unknown key. Did you mean '{nearest}'?"]


def test_all_bad_keys_are_reported_at_once_a_line_each():
    ds_config = {
        "sequence_parallel_size": 0,
        "sequence_paralel_size": 2,
        "seq_parallel_communication_data_type": "fp8",
        "liger_kernel": True,
        "alst": {"pad_to_multiple_of": -3, "memory_lean_layer": 1, "liger": "auto", "reduction": 7},
    }
    lines = problems_of(ds_config)
    named = [line.split(": ")[0] for line in lines]
    assert sorted(named) == [
        "alst.liger",
        "alst.memory_lean_layer",
        "alst.pad_to_multiple_of",
        "alst.reduction",
        "liger_kernel",
        "seq_parallel_communication_data_type",
        "sequence_paralel_size",
        "sequence_parallel_size",
    ]


def test_a_padding_that_does_not_fit_is_reported_together_with_keys_in_the_wrong_place():
    lines = problems_of({**alst(pad_to_multiple_of=511), "liger_kernel": True})
    assert len(lines) == 2, lines


def test_a_refused_config_is_a_value_error_of_this_package():
    with pytest.raises(ValueError, match="unknown key") as refused:
        parse(alst(zzz=1))
    assert isinstance(refused.value, AlstError)


# --- against the world and the model


@pytest.mark.parametrize(("sp_size", "world_size"), [(1, 1), (1, 7), (2, 2), (2, 8), (3, 6), (7, 7)])
def test_an_sp_degree_that_divides_the_world_is_accepted(sp_size, world_size):
    check_world(AlstConfig(sequence_parallel_size=sp_size), world_size)


@pytest.mark.parametrize(
    ("sp_size", "world_size", "fitting"),
    [(3, 8, "[1, 2, 4, 8]"), (2, 7, "[1, 7]"), (16, 8, "[1, 2, 4, 8]"), (4, 6, "[1, 2, 3, 6]"), (2, 1, "[1]")],
)
def test_an_sp_degree_that_does_not_divide_the_world_is_refused_with_those_that_do(sp_size, world_size, fitting):
    with pytest.raises(ConfigError) as refused:
        check_world(AlstConfig(sequence_parallel_size=sp_size), world_size)
    assert str(refused.value) == (
        f"sequence_parallel_size={sp_size} does not divide the world size ({world_size} ranks). Use one of {fitting}."
    )


def test_the_degrees_that_are_named_fit_the_ranks_and_a_scans_heads():
    with pytest.raises(ConfigError, match=r"Use one of \[1, 3\];"):
        check_world(AlstConfig(sequence_parallel_size=9), 9, [(6, 3, "scan")])
    with pytest.raises(ConfigError, match=r"3 ranks\)\. Use one of \[1, 3\]\."):
        check_world(AlstConfig(sequence_parallel_size=2), 3, [(8, 8, "attention")])
    with pytest.raises(ConfigError, match=r"12 ranks\)\. Use one of \[1, 2, 3, 4, 6, 12\]\."):
        check_world(AlstConfig(sequence_parallel_size=5), 12, [(7, 1, "attention")])
    with pytest.raises(ConfigError, match=r"6 ranks\)\. Use one of \[1, 2, 3\]\."):
        check_world(AlstConfig(sequence_parallel_size=4), 6, [(12, 12, "attention"), (5, 1, "scan")])


@pytest.mark.parametrize(
    ("sp_size", "heads", "world_size", "fitting"), [(16, 8, 32, "[1, 2, 4, 8]"), (8, 7, 8, "[1, 2, 4]")]
)
def test_an_sp_degree_above_the_heads_of_a_scan_is_refused_with_those_that_fit(sp_size, heads, world_size, fitting):
    with pytest.raises(ConfigError) as refused:
        check_world(AlstConfig(sequence_parallel_size=sp_size), world_size, [(heads, 1, "scan")])
    assert str(refused.value) == (
        f"sequence_parallel_size={sp_size} exceeds the model's {heads} heads of a scan, of which each rank of a "
        f"sequence needs one. Use one of {fitting}; the remaining ranks become data-parallel replicas."
    )
    check_world(AlstConfig(sequence_parallel_size=sp_size), world_size, [(heads, 1, "attention")])
