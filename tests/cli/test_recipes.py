"""Every recipe is a row of its README, is accepted by DeepSpeed's parser and by ours, and keeps the rules."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from benchmarks.recipes import (
    FOLDER,
    PURPOSES,
    crossing_bytes,
    crossing_share,
    load,
    num_params,
    problems,
)
from benchmarks.tiles.shapes import REAL_SIZE
from deepspeed_alst.cli.main import main
from deepspeed_alst.config.compatibility import REFUSED, check_features, check_world
from deepspeed_alst.config.schema import parse

ROOT = Path(__file__).parents[2]
SHAPES = {shape.name: shape for shape in REAL_SIZE}


def test_each_file_has_a_row():
    assert sorted(PURPOSES) == sorted(path.stem for path in FOLDER.glob("*.json") if path.suffixes == [".json"])


@pytest.mark.parametrize("name", PURPOSES)
def test_a_recipe_is_accepted_for_its_ranks(name):
    recipe = load(name)
    check_features(recipe.ds_config)
    check_world(recipe.config, recipe.ranks)
    if recipe.shape is not None:
        keys = recipe.shape.keys
        assert recipe.config.sequence_parallel_size <= keys["num_attention_heads"], "K and V are no whole copies"
    ds_config = recipe.ds_config
    if "auto" in ds_config.values():  # the HF Trainer's, which fills it in
        ds_config = filled_by_the_trainer(FOLDER / f"{name}.json")
    assert DeepSpeedConfig(ds_config).gradient_accumulation_steps == recipe.config.sequence_parallel_size


def filled_by_the_trainer(path):
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    args = TrainingArguments(output_dir="unused", use_cpu=True, deepspeed=str(path))
    AcceleratorState._reset_state(reset_partial_state=True)
    ds_config = args.hf_deepspeed_config.config
    unset_hf_deepspeed_config()  # else models are built sharded for as long as args live
    # The Trainer's model says how large it is.
    ds_config["zero_optimization"]["reduce_bucket_size"] = 1 << 20
    # One rank fills in its own world; the recipe is for as many as share a sequence.
    return {key: value for key, value in ds_config.items() if key != "train_batch_size"}


def test_the_compatibility_page_is_the_table_in_the_code():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    for feature in REFUSED:
        assert f"| {feature.name} | `{feature.path}` | refused: {feature.refusal} |" in page
    assert page.count("| refused: ") == len(REFUSED)


# --- what the files say of one another


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: each for name, inner in value.items() for key, each in flat(inner, f"{path}.{name}".strip(".")).items()
    }


def differences(one: str, other: str) -> set[str]:
    """The JSON paths where two recipes differ."""
    a, b = flat(load(one).ds_config), flat(load(other).ds_config)
    return {path for path in a.keys() | b.keys() if a.get(path) != b.get(path)}


SP = {"sequence_parallel_size", "gradient_accumulation_steps"}
MLP, OFFLOAD = {"alst.tiled_mlp_compute"}, {"alst.activation_checkpoint_cpu_offload"}


@pytest.mark.parametrize(
    ("one", "other", "keys"),
    [
        ("llama-8b-h100x8-baseline", "llama-8b-h100x8-loss", {"alst.tiled_logits_loss"}),
        ("llama-8b-h100x8-loss", "llama-8b-h100x8-loss-sp", SP),
        ("llama-8b-h100x8-loss-sp", "llama-8b-h100x8-loss-sp-mlp", MLP),
        ("llama-8b-h100x8-loss-sp", "llama-8b-h100x8-loss-sp-offload", OFFLOAD),
        ("llama-8b-h100x8-loss-sp-mlp", "llama-8b-h100x8", OFFLOAD),
        ("run-sp1-llama-8b-baseline", "run-sp8-llama-8b", SP | MLP | OFFLOAD),
    ],
)
def test_rows_differ_by_what_they_are_named_for(one, other, keys):
    assert differences(one, other) == keys


# --- the arithmetic


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-32B"])
def test_the_parameters_are_those_of_the_model(name):
    from transformers import AutoModelForCausalLM

    shape = SHAPES[name]
    config = shape.config()
    config.num_hidden_layers, config.tie_word_embeddings = 2, False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert num_params(replace(shape, num_layers=2)) == sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("name", PURPOSES)
def test_a_recipe_keeps_the_rules(name):
    assert problems(load(name)) == []


@pytest.mark.parametrize(
    ("name", "changed", "found"),
    [
        ("llama-8b-h100x8", {"zero_optimization": {"stage": 3}}, "the optimizer belongs elsewhere"),
        ("qwen3-32b-h100x1", {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "half"),
        ("llama-70b-h100x8", {"alst": {"activation_checkpoint_cpu_offload": True}}, "need a disk"),
    ],
)
def test_a_recipe_that_an_expert_would_not_write_is_named(name, changed, found):
    recipe = load(name)
    ds_config = {**recipe.ds_config, **changed}
    assert any(found in line for line in problems(replace(recipe, ds_config=ds_config, config=parse(ds_config))))


def test_nothing_crosses_while_a_sequence_fits_a_host_and_shares_fall_with_its_length():
    shape = SHAPES["Llama-3.1-8B"]
    assert crossing_bytes(shape, 8) == 0
    # 16 ranks: 8 others, each with 2 query heads and outputs, a key head and a value head of 128 numbers in bf16.
    # Two ranks of a host share a KV head, whose rows are sent to one of them.
    assert crossing_bytes(shape, 16) == 8 * (2 + 2 + 0.5 + 0.5) * 128 * 2
    shares = [crossing_share(shape, 16, 2**power) for power in (14, 17, 20)]
    assert shares == sorted(shares, reverse=True)


# --- ds_alst recipes


def test_the_command_lists_every_recipe_or_those_of_a_name(capsys):
    assert main(["recipes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == list(PURPOSES)
    assert main(["recipes", "qwen3"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == [name for name in PURPOSES if "qwen3" in name]


def test_the_command_shows_a_recipe_and_copies_it_once(tmp_path, capsys):
    content = (FOLDER / "sp2.json").read_text()
    assert main(["recipes", "sp2.json"]) == 0 and capsys.readouterr().out == content
    for path in (tmp_path, tmp_path / "ds.json"):
        assert main(["recipes", "sp2", "--copy", str(path)]) == 0
        assert main(["recipes", "sp2", "--copy", str(path)]) == 2 and "does not exist yet" in capsys.readouterr().err
    assert (tmp_path / "sp2.json").read_text() == (tmp_path / "ds.json").read_text() == content


@pytest.mark.parametrize("words", [["sp3"], ["qwen3", "--copy", "ds.json"], ["--copy", "ds.json"]])
def test_a_name_that_is_not_a_recipes_is_an_error_with_the_names_there_are(words, capsys):
    assert main(["recipes", *words]) == 2
    assert "qwen3-32b-h100x8" in capsys.readouterr().err and not Path("ds.json").exists()
