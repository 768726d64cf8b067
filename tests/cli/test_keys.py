"""``ds_alst keys`` and ``ds_alst schema``: the files they print, and the schema against the parser."""

import json
from pathlib import Path

import pytest

from deepspeed_alst.cli.main import main
from deepspeed_alst.config.config_file import TOP_KEYS
from deepspeed_alst.config.schema import BLOCKS, AlstBlockConfig, AlstConfig, parse
from deepspeed_alst.errors import ConfigError

ROOT = Path(__file__).parents[2]
READY = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path.suffixes == [".json"])
SP, TILES, LOSS = "sequence_parallel_size", "tiled_mlp_compute", "tiled_logits_loss"
REDUCTION, OFFLOAD = "reduction", "activation_checkpoint_cpu_offload"


def printed(capsys, command: str) -> str:
    assert main([command]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "path"), [("keys", "docs/configuration.md"), ("schema", "ds_configs/alst.schema.json")]
)
def test_the_file_is_what_the_command_prints(command, path, capsys):
    assert (ROOT / path).read_text(encoding="utf-8") == printed(capsys, command), f"ds_alst {command} > {path}"


def test_the_reference_has_every_key_with_a_meaning(capsys):
    rows = [line.strip("| ").split(" | ") for line in printed(capsys, "keys").splitlines() if line.startswith("| `")]
    keys = [*AlstConfig.model_fields, *(f"alst.{key}" for key in AlstBlockConfig.model_fields)]
    keys += [f"alst.{name}.{key}" for name, block in BLOCKS.items() for key in block.model_fields]
    assert sorted(row[0].strip("`") for row in rows) == sorted(keys)
    assert all(len(row) == 4 and all(row) for row in rows)


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_schema_accepts_every_ready_ds_config(path, capsys):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator(json.loads(printed(capsys, "schema"))).validate(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "ds_config",
    [
        {"$schema": "alst.schema.json", "zero_optimization": {"stage": 3}, "alst": {}},
        *({key: value} for key in TOP_KEYS for value in (True, False, {}, None, "auto")),
        *({SP: value} for value in (1, 8, 0, "8", True)),
        *({"alst": {TILES: value}} for value in ({"tile_bytes": 5e8}, {"tile_bytes": "auto"}, {"tile_byte": 1}, 1)),
        *({"alst": {LOSS: value}} for value in (True, "auto", "triton", "cuda", {"backend": "liger"}, None)),
        *({"alst": {REDUCTION: value}} for value in ({}, {"slice_bytes": 4095}, {"bucket_size": None}, True)),
        *({"alst": {OFFLOAD: value}} for value in ({"nvme_path": ""}, {"keep_last": -1}, {"host_budget": 0}, None)),
        *({"alst": {"memory_lean_layer": value}} for value in (False, True, "auto", "on")),
        *({"alst": {"liger_kernel": value}} for value in ("auto", {"rope": True}, {"rope": 1}, None, "on")),
        *({"alst": {"save_attention_output": value}} for value in (True, "auto", "on", 1)),
        {"alst": {"pad_to_multiple_of": 512}},
        {"alst": {"pad_to_multiple_of": 0}},
        {"alst": {"no_such_key": 1}},
        {"alst": True},
    ],
    ids=json.dumps,
)
def test_the_schema_says_what_the_parser_says(ds_config, capsys):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    try:
        parse(ds_config)
        accepted = True
    except ConfigError:
        accepted = False
    assert validator(json.loads(printed(capsys, "schema"))).is_valid(ds_config) == accepted
