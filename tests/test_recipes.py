"""Every recipe is one row of its README, and is accepted by DeepSpeed's parser and by ours."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from deepspeed_alst.compatibility import FEATURES, check_features
from deepspeed_alst.config import check_world, parse

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "ds_configs").glob("*.json"))


def test_the_readme_has_a_row_for_each_recipe():
    rows = (ROOT / "ds_configs" / "README.md").read_text().splitlines()
    named = [row.split("`")[1] for row in rows if row.startswith("| `")]
    assert sorted(named) == [recipe.name for recipe in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_accepted(recipe):
    ds_config = json.loads(recipe.read_text())
    config = parse(ds_config)
    check_features(ds_config)
    check_world(config, 8)
    if "auto" in ds_config.values():  # the HF Trainer's, which fills it in
        ds_config = filled_by_the_trainer(recipe)
    assert DeepSpeedConfig(ds_config).gradient_accumulation_steps == config.sequence_parallel_size


def filled_by_the_trainer(recipe):
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir="unused", use_cpu=True, deepspeed=str(recipe))
    AcceleratorState._reset_state(reset_partial_state=True)
    ds_config = args.hf_deepspeed_config.config
    # The Trainer's model says how large it is.
    ds_config["zero_optimization"]["reduce_bucket_size"] = 1 << 20
    # One rank fills in its own world; the recipe is for as many as share a sequence.
    return {key: value for key, value in ds_config.items() if key != "train_batch_size"}


def test_the_compatibility_page_is_the_table_in_the_code():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    for feature in FEATURES:
        verdict = f"refused: {feature.refusal}" if feature.refusal else "right"
        assert f"| {feature.name} | `{feature.path}` | {verdict} |" in page
    assert page.count("\n| ") == len(FEATURES) + 1
