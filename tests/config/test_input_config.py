"""Any ds_config at all: read with its documented meaning, or refused with the path and the value; never a crash.

The values are what JSON can say, and Python reads of it: NaN, Infinity, huge numbers, lone surrogates, deep nesting.
"""

import copy
import importlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepspeed_alst import hooks
from deepspeed_alst.config.compatibility import (
    REFUSED,
    check_features,
    check_world,
    zero_stage,
)
from deepspeed_alst.config.schema import BLOCKS, AlstBlockConfig, AlstConfig, parse
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import as_word, shown

ROOT = Path(__file__).parents[2]
READY = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path.suffixes == [".json"])
RECIPES = [json.loads(path.read_text()) for path in READY]
# Of one core. Thousands of times what a ds_config takes, and less than a person notices.
SECONDS = 5.0

INNER_KEYS = sorted({key for block in BLOCKS.values() for key in block.model_fields})
WORDS = ("auto", "true", "1", "", "fp32", "BF16", "torch", "triton", "liger", "alst", "TiledLossConfig", "LigerConfig")
NUMBERS = (0, 1, 2, 4096, 2**63 - 1, 2**63, 10**400, 5e8, 0.5, -0.0, math.inf, -math.inf, math.nan)
TEXT = st.sampled_from(WORDS) | st.text(st.characters(), max_size=5)
LEAVES = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | TEXT
KEYS = st.sampled_from([*AlstConfig.model_fields, *AlstBlockConfig.model_fields, *INNER_KEYS]) | TEXT
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)


def read(ds_config: dict[str, Any]) -> AlstConfig:
    """What is done with a ds_config before a process is started: ``initialize`` in its order, on two ranks."""
    config = parse(ds_config)
    zero_stage(ds_config)
    if config.sequence_parallel_size > 1:
        check_features(ds_config)
        check_world(config, 2, [(4, 2, "scan")])
    return config


def put(ds_config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    inner = ds_config
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return ds_config


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [{"a": value}]
    return value


# --- the meaning of a value, after the table of keys: written again, so that the two are compared

INVALID = "invalid"


def _only(*allowed: Any) -> Any:
    return lambda value: value if any(type(value) is type(ok) and value == ok for ok in allowed) else INVALID


def _count(*words: Any, least: int = 1) -> Any:
    """A whole number however it is written, or a word."""

    def meaning(value: Any) -> Any:
        if value in words and not isinstance(value, list | dict):
            return value
        if type(value) is int or (type(value) is float and math.isfinite(value) and value.is_integer()):
            return int(value) if least <= value < 2**63 else INVALID
        return INVALID

    return meaning


def _integer(least: int, *words: Any) -> Any:
    def meaning(value: Any) -> Any:
        if type(value) is int:
            return value if value >= least else INVALID
        return _only(*words)(value)

    return meaning


def _dtype(value: Any) -> Any:
    return value.lower() if isinstance(value, str) and value.lower() in ("fp32", "bf16", "fp16") else INVALID


def _loss_bytes(value: Any) -> Any:
    return 2**30 if value == "auto" else _count()(value)


BACKENDS = ("auto", "torch", "triton", "liger")
MEANINGS = {
    "sequence_parallel_size": _integer(1),
    "seq_parallel_communication_data_type": _dtype,
    "alst.pad_to_multiple_of": _count("auto"),
    "alst.expandable_segments": _only(True, False, None),
    "alst.reduction.slice_bytes": _count(least=4096),
    "alst.reduction.bucket_size": _count("auto", None),
    "alst.tiled_mlp_compute.tile_tokens": _integer(1, None),
    "alst.tiled_mlp_compute.tile_bytes": _count("auto"),
    "alst.tiled_mlp_compute.min_tokens": _integer(0),
    "alst.tiled_mlp_compute.fp32_accumulation": _only(True, False),
    "alst.tiled_logits_loss.tile_tokens": _integer(1, None),
    "alst.tiled_logits_loss.tile_bytes": _loss_bytes,
    "alst.tiled_logits_loss.backend": _only(*BACKENDS),
    **{f"alst.liger_kernel.{part}": _only(True, False, None) for part in BLOCKS["liger_kernel"].model_fields},
    "alst.activation_checkpoint_cpu_offload.host_budget": _count("auto"),
    "alst.activation_checkpoint_cpu_offload.keep_last": _integer(0, None),
    "alst.activation_checkpoint_cpu_offload.packing": _only("lossless", "auto", False),
    "alst.check_model": _only(True, False),
    "alst.save_attention_output": _only(True, False, "auto"),
    **{f"alst.memory_lean_layer.{key}": _integer(1) for key in ("chunk_tokens", "tile_tokens", "key_block")},
    "alst.memory_lean_layer.min_tokens": _integer(0),
}


def test_every_key_has_its_meaning_here_or_is_a_block_or_a_path():
    keys = {f"alst.{name}.{key}" for name, block in BLOCKS.items() for key in block.model_fields}
    keys |= {f"alst.{key}" for key in AlstBlockConfig.model_fields} - {f"alst.{name}" for name in BLOCKS}
    keys |= set(AlstConfig.model_fields) - {"alst"}
    assert keys - set(MEANINGS) == {"alst.activation_checkpoint_cpu_offload.nvme_path"}


@settings(max_examples=500)
@given(st.sampled_from(sorted(MEANINGS)), JSON)
@example("alst.expandable_segments", "no")
@example("alst.expandable_segments", 1)
def test_any_value_at_any_key_has_its_documented_meaning_or_is_refused_with_path_and_value(path, value):
    ds_config, expected = put({}, path, value), MEANINGS[path](value)
    try:
        config = parse(ds_config)
    except ConfigError as error:
        assert expected is INVALID
        (line,) = str(error).splitlines()
        assert line.startswith(path)
        assert f"(got {shown(value)})" in line
        return
    found: Any = config
    for name in path.split("."):
        found = getattr(found, name)
    assert type(found) is type(expected) and found == expected
    assert ds_config == put({}, path, value) and parse(ds_config) == config


@settings(max_examples=500)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "sequence_parallel_size": st.sampled_from([1, 2]) | JSON,
            "seq_parallel_communication_data_type": JSON,
            "zero_optimization": st.fixed_dictionaries({}, optional={"stage": JSON, "offload_optimizer": JSON}) | JSON,
            "alst": st.dictionaries(KEYS, JSON, max_size=4) | JSON,
        },
    ),
    st.dictionaries(KEYS, JSON, max_size=2),
    st.sampled_from(sorted({feature.path for feature in REFUSED} | {"bf16", "fp16"})),
    JSON,
)
@example({"alst": {"tiled_logits_loss": {"TiledLossConfig": 1}, "LigerConfig": 1}}, {}, "fp16", {})
@example({}, {"alst\n": 1, "\ud800": 2}, "tensor_parallel.autotp_size", [2])
@example({}, {}, "compile.passes", 5)
def test_any_ds_config_is_read_or_refused_line_by_line(known, others, path, value):
    ds_config = {**known, **others}
    if isinstance(ds_config.get(path.split(".")[0], {}), dict) and path.count(".") < 2:
        put(ds_config, path, value)
    before, started = copy.copy(ds_config), time.process_time()
    try:
        config = read(ds_config)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert lines and all(line.isprintable() and len(line) < 1500 for line in lines)
        names = {as_word(str(key)) for key in ds_config} | {"sequence_parallel_size"}
        assert all(any(line.startswith(name) for name in names) for line in lines), lines
    else:
        assert read(ds_config) == config
    assert time.process_time() - started < SECONDS
    assert list(ds_config) == list(before)


EXTREMES = {
    "an endless name": ({"a" * 10**6: 1, "alst": {"b" * 10**6: 1}}, r"alst\.b+\.\.\.: unknown key"),
    "an endless value": ({"alst": {"reduction": "x" * 10**6}}, r"alst\.reduction: must be an object .*x\.\.\.\)"),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_what_is_too_large_is_refused_in_a_short_line_at_once(name):
    ds_config, words = EXTREMES[name]
    started = time.process_time()
    with pytest.raises(ConfigError) as refused:
        read(ds_config)
    assert time.process_time() - started < SECONDS
    assert re.search(words, str(refused.value)) and len(str(refused.value)) < 1500


@given(st.sampled_from([(), *((name,) for name in BLOCKS)]), st.text(min_size=1, max_size=8))
@example((), "bf16")
@example(("reduction",), "bf16")
def test_an_unknown_key_is_named_with_what_is_known(block, key):
    known = BLOCKS[block[0]].model_fields if block else AlstBlockConfig.model_fields
    if key in known or (not block and (key in AlstConfig.model_fields or key in INNER_KEYS)):
        return
    with pytest.raises(ConfigError) as refused:
        parse(put({}, ".".join(("alst", *block)), {key: 1}))
    (line,) = str(refused.value).splitlines()
    path = ".".join(("alst", *block, as_word(key)))
    elsewhere = r"belongs (at the top level|in a block) of the ds_config, as \S+"
    assert re.fullmatch(re.escape(path) + rf": ({elsewhere}\.|unknown key\. .+)", line)
    assert re.search(f"Did you mean '|{elsewhere}", line) or all(name in line for name in known)


@pytest.mark.parametrize("name", sorted({*AlstBlockConfig.model_fields, *INNER_KEYS}))
def test_a_key_with_two_letters_exchanged_is_suggested(name):
    block = next((block for block, keys in BLOCKS.items() if name in keys.model_fields), None)
    path = ("alst",) if name in AlstBlockConfig.model_fields else ("alst", str(block))
    with pytest.raises(ConfigError, match=f"Did you mean '{name}'"):
        parse(put({}, ".".join(path), {name[:2] + name[3] + name[2] + name[4:]: True}))


# --- the files


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value. A loop: what recursion reaches depends on who calls."""
    found, containers = [], [value]
    for container in containers:
        for key in container if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], dict | list):
                containers.append(container[key])
    return found


@st.composite
def spoilt_files(draw) -> str:
    """The text of a ready recipe with a few things done to it, as text and as JSON."""
    ds_config = copy.deepcopy(draw(st.sampled_from(RECIPES)))
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(ds_config)):
            break
        container, key = draw(st.sampled_from(found))
        what = draw(st.sampled_from(["drop", "replace", "list", "rename", "nest"]))
        if what == "drop":
            del container[key]
        elif what == "replace":
            container[key] = draw(JSON)
        elif what == "list":
            container[key] = [container[key]]
        elif what == "rename" and isinstance(container, dict):
            container[draw(KEYS)] = container.pop(key)
        elif what == "nest":
            container[key] = nested(draw(st.sampled_from([3, 60, 100])))
    text = json.dumps(ds_config)
    what = draw(st.sampled_from(["nothing", "nothing", "twice", "cut", "character", "deep", "digits"]))
    at = draw(st.integers(0, len(text) - 1))
    if what == "twice":
        text = "{" + text.strip()[1:-1].rstrip(",") + ', "sequence_parallel_size": 2, "sequence_parallel_size": 2}'
    elif what == "cut":
        text = text[:at]
    elif what == "character":
        text = text[:at] + draw(st.characters(exclude_categories=["Cs"])) + text[at + 1 :]
    elif what == "deep":
        text = text.replace("1", "[" * 5000 + "]" * 5000, 1)
    elif what == "digits":
        text = text.replace("1", "1" * 5000, 1)
    return text


@settings(max_examples=400)
@given(spoilt_files())
def test_a_spoilt_file_is_read_or_refused_and_what_is_no_json_is_left_to_deepspeed(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "ds.json"
    file.write_text(text, encoding="utf-8")
    importlib.import_module("deepspeed.runtime.tensor_parallel.init_utils")  # not timed: programs have it
    started = time.process_time()
    ds_config = hooks.find_config({"config": str(file)})
    if hooks.is_wanted(ds_config):
        try:
            read(ds_config)
        except ConfigError as error:
            assert str(error).strip()
    assert time.process_time() - started < SECONDS


UNREADABLE = ("[" * 100_000, '{"alst": 1' + "1" * 5000 + "}", '{"a": 1, "a": 2}', "\\ufeff{}", "[]", "")


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_file_on_the_command_line_that_cannot_be_read_does_not_break_the_import(tmp_path, monkeypatch, text):
    """It is looked up where transformers or deepspeed is imported, by programs whose file it may not be."""
    file = tmp_path / "ds.json"
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["train.py", "--deepspeed", str(file)])
    assert not hooks.is_wanted(hooks._command_line_config())


STAGES = [(3, 3), ("3", 3), (2.0, 2), (True, 1), ("auto", 0), (None, None), ("4", None), ([3], None)]


@pytest.mark.parametrize(("value", "stage"), STAGES)
def test_the_stage_is_read_as_deepspeed_reads_it(value, stage, capsys):
    from deepspeed.runtime.zero.config import get_zero_config

    ds_config = {"zero_optimization": {"stage": value}}
    if stage is None:
        with pytest.raises(ConfigError, match=r"^zero_optimization\.stage: use 0, 1, 2 or 3 \(got "):
            zero_stage(ds_config)
        with pytest.raises(ValueError):
            get_zero_config(ds_config)
    else:
        assert zero_stage(ds_config) == int(get_zero_config(ds_config).stage) == stage
