"""TRL's trainers of preference, reinforcement learning and distillation by keys only: loss, log, weights are SP 1's."""

import pytest

from benchmarks.ranks import RankError
from deepspeed_alst.errors import ConfigError
from tests.integrations.trl_runs import compare, train

DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
GRPO_LOSSES = ("grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
CASES = {
    "DPO": {},
    "DPO, its reference without the adapter, evaluated": {"lora": True, "evaluates": True},
    "DPO, ZeRO 3, evaluated": {"stage": 3, "evaluates": True},
    "DPO, all losses": {"loss_type": list(DPO_LOSSES), "label_smoothing": 0.1},
    "GRPO, evaluated": {"evaluates": True},
    "GRPO, ZeRO 3, LoRA": {"stage": 3, "lora": True},
    "GRPO, tokens of high entropy, adaptive bonus": {
        **{"top_entropy_quantile": 0.4, "use_adaptive_entropy": True, "entropy_target": 9.0},
        **{"entropy_coef": 0.1, "max_steps": 3, "evaluates": True},
    },
    "RLOO": {},
    "KTO": {"loss_type": "apo_zero_unpaired", "evaluates": True},
    "KTO, batches of one label": {
        **{"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
        **{"max_steps": 3, "blocks": 8},
    },
    "KTO, its KL, evaluated": {"max_steps": 3, "evaluates": True},
    "KTO, its KL, ZeRO 3, LoRA": {"max_steps": 3, "stage": 3, "lora": True},
    "Reward, evaluated": {"evaluates": True, "center_rewards_coefficient": 0.1},
    "Reward, ZeRO 3, LoRA": {"stage": 3, "lora": True},
    "SFT": {"loss_type": "dft", "evaluates": True},
    "Distillation, evaluated": {"beta": 0.3, "evaluates": True},
    "Distillation, ZeRO 3, LoRA": {"beta": 0.0, "temperature": 0.7, "stage": 3, "lora": True},
    "GKD, evaluated": {"evaluates": True},
}
OF_GRPO = {f"GRPO, {loss}": {"loss_type": loss, "max_steps": 1} for loss in GRPO_LOSSES}
OF_GRPO["GRPO, luspo"]["importance_sampling_level"] = "sequence"
CASES |= OF_GRPO
SLOW = {
    *OF_GRPO,
    *("DPO", "GRPO, ZeRO 3, LoRA", "GRPO, tokens of high entropy, adaptive bonus", "KTO", "KTO, batches of one label"),
    *("KTO, its KL, ZeRO 3, LoRA", "Reward, evaluated", "Distillation, ZeRO 3, LoRA"),
    "DPO, its reference without the adapter, evaluated",
}


def train_case(sp_size: int, case: str, **options) -> dict:
    return train(sp_size, case.split(",")[0], **CASES[case], **options)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_a_trainer_at_sp2_logs_and_trains_as_at_sp1(case, ranks2):
    compare(*(ranks2.run(train_case, sp, case)[0] for sp in (1, 2)))


@pytest.mark.parametrize(
    ("case", "sp_size"),
    [
        pytest.param(case, sp_size, marks=[pytest.mark.slow] * ((case, sp_size) != ("DPO", 2)))
        for case in ("GRPO, evaluated", "DPO", "KTO, its KL, evaluated")
        for sp_size in (2, 4)
    ],
)
def test_a_trainer_on_four_ranks_logs_and_trains_as_at_sp1(case, sp_size, ranks4):
    compare(*(ranks4.run(train_case, each, case)[0] for each in (1, sp_size)))


def train_and_save(sp_size: int, folder: str, resume: str | None = None) -> dict:
    return train(sp_size, "DPO", max_steps=4, folder=folder, resume=resume, save_strategy="steps", save_steps=2)


@pytest.mark.slow
def test_a_resumed_run_logs_and_trains_as_an_unbroken_one_at_sp1(ranks2, tmp_path):
    whole, split = (ranks2.run(train_and_save, sp, str(tmp_path / str(sp)))[0] for sp in (1, 2))
    resumed = [
        ranks2.run(train_and_save, sp, str(tmp_path / f"new{sp}"), str(tmp_path / str(sp) / "checkpoint-2"))[0]
        for sp in (1, 2)
    ]
    compare(whole, split)
    compare(*resumed)
    for line in (*whole["log"], *resumed[1]["log"]):  # of the steps since the resume, at SP 1 too
        line.pop("num_tokens", None)
        line.pop("train_loss", None)
    compare(whole, resumed[1])


def train_own_loss() -> None:
    import trl

    class Own(trl.DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs)
            return loss * (1 + self.accelerator.gather(loss.detach()).mean())

    train(2, "DPO", kind=Own)


def test_a_trainer_whose_loss_the_program_overrides_is_refused(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(train_own_loss)
    assert all(isinstance(each, ConfigError) and "overridden in Own" in str(each) for each in caught.value.errors)
