"""TRL's trainers train models of images and text by keys only: loss, log and weights are SP 1's."""

import pytest

from benchmarks.ranks import RankError
from deepspeed_alst.errors import ConfigError
from tests.integrations.trl_runs import compare, train

CASES = {
    "SFT, ZeRO 3": ("llava", {"stage": 3, "evaluates": True}),
    "SFT, grids": ("qwen2_5_vl", {"evaluates": True, "max_steps": 3}),
    "SFT, image masks": ("gemma3", {"stage": 1, "evaluates": True}),
    "SFT, LoRA, dft": ("qwen2_5_vl", {"lora": True, "loss_type": "dft", "evaluates": True}),
    "DPO": ("llava", {"evaluates": True}),
}


def train_case(sp_size: int, case: str) -> dict:
    images, options = CASES[case]
    return train(sp_size, case.split(",")[0], images=images, **options)


@pytest.mark.parametrize(
    "case", [case if case == "SFT, ZeRO 3" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_trainer_of_images_logs_and_trains_as_at_sp1(case, ranks2):
    whole, split = (ranks2.run(train_case, sp, case, seconds=300)[0] for sp in (1, 2))
    # Softmax cancels the keys' biases, which are rounding; some layers of the tower are not used.
    whole["weights"] = {key: x for key, x in whole["weights"].items() if x.any() and "k_proj.bias" not in key}
    compare(whole, split)


def train_with_rewards() -> None:
    train(2, "RLOO", images="llava")


@pytest.mark.slow
def test_a_trainer_that_is_not_verified_with_images_is_refused(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(train_with_rewards)
    assert all(isinstance(each, ConfigError) and "RLOOTrainer: not ver" in str(each) for each in caught.value.errors)
