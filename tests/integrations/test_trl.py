"""TRL's SFTTrainer by keys only: its fused head scores shards, and the loss, the weights and the log are SP 1's."""

import pytest
import trl
from trl.experimental import orpo

from benchmarks.families import family_config
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.integrations.hf_trainer import check_trainer
from tests.integrations.trl_runs import compare, train

CASES = {
    "ZeRO 2": {"evaluates": True},
    "ZeRO 3": {"stage": 3, "evaluates": True},
    "packing": {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1},
    # TRL's fused head takes Mixtral's function for every family, and adds the loss to its own.
    "mixture": {"config": "olmoe", "router_aux_loss_coef": 1.0, "evaluates": True},
}


def train_case(sp_size: int, case: str) -> dict:
    options = dict(CASES[case])
    config = family_config(options.pop("config")) if "config" in options else None
    return train(sp_size, "SFT", config=config, max_steps=3, learning_rate=0.5, **options)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == "ZeRO 2" else case for case in CASES]
)
def test_sft_at_sp2_is_sft_at_sp1(case, ranks2):
    whole, split = (ranks2.run(train_case, sp_size, case)[0] for sp_size in (1, 2))
    compare(whole, split)
    losses = [line["loss"] for line in whole["log"] if "loss" in line]
    assert losses[0] > losses[-1] + 0.05
    assert case != "mixture" or all("aux_loss" in line for line in split["log"] if "loss" in line)


def test_a_loss_of_other_outputs_is_refused_by_the_trainers_name():
    kind = orpo.ORPOTrainer
    for each in (kind, type("Own", (kind,), {})):
        trainer = each.__new__(each)
        trainer.compute_loss_func, trainer.model_wrapped = None, None
        trainer.args = trl.SFTConfig(output_dir="unused", use_cpu=True, bf16=False)
        with pytest.raises(ConfigError, match="ORPOTrainer: it needs outputs"):
            check_trainer(trainer)
