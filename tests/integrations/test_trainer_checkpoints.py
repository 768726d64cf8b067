"""Checkpoints through the HF Trainer: resumed in the middle of an epoch, at another SP degree, on another world."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.integrations.test_trainer import facts, make_trainer

STEPS = 4


def train(folder: str, sp_size: int, stage: int, gas: int, resume: str | None = None, save: bool = False) -> dict:
    """Four steps of four samples each; a checkpoint after the second, if asked for."""
    options = {"save_strategy": "steps", "save_steps": 2} if save else {}
    trainer = make_trainer(
        sp_size,
        folder,
        stage=stage,
        max_steps=STEPS,
        gradient_accumulation_steps=gas,
        optim="adamw_torch",
        learning_rate=0.02,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    result = facts(trainer)
    trainer.model_wrapped.destroy()
    return result


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["stage2", "stage3"])
def saved(request, ranks2, tmp_path_factory):
    """A run at SP 2 that was not interrupted, and its checkpoint of the second step."""
    folder = str(tmp_path_factory.mktemp("run"))
    whole = ranks2.run(train, folder, 2, request.param, 2, None, True)[0]
    return request.param, folder, whole


def differences(resumed: dict, whole: dict) -> tuple[float, float]:
    """Largest relative differences of the loss after the resume, and of the weights."""
    assert resumed["counts"] == whole["counts"]
    losses = [[line["loss"] for line in run["log"] if "loss" in line][-2:] for run in (resumed, whole)]
    loss = max(abs(ours - theirs) / theirs for ours, theirs in zip(*losses, strict=True))
    weights = max(
        float((resumed["weights"][name] - weight).norm() / weight.norm()) for name, weight in whole["weights"].items()
    )
    return loss, weights


def test_a_resume_in_the_middle_of_an_epoch_goes_on_bit_by_bit(saved, ranks2, tmp_path):
    stage, folder, whole = saved
    resumed = ranks2.run(train, str(tmp_path), 2, stage, 2, f"{folder}/checkpoint-2")[0]
    assert differences(resumed, whole) == (0.0, 0.0)


def test_a_resume_at_sp1_on_as_many_ranks(saved, ranks2, tmp_path):
    stage, folder, whole = saved
    resumed = ranks2.run(train, str(tmp_path), 1, stage, 2, f"{folder}/checkpoint-2")[0]
    assert max(differences(resumed, whole)) < 1e-5


@pytest.mark.slow
def test_a_resume_at_sp4_on_twice_as_many_ranks(saved, ranks4, tmp_path):
    stage, folder, whole = saved
    resumed = ranks4.run(train, str(tmp_path), 4, stage, 1, f"{folder}/checkpoint-2")[0]
    assert max(differences(resumed, whole)) < 1e-5


def save_whole(folder: str) -> list[float]:
    """Train a step at SP 2, save the model as users do, and say what it makes of a prompt."""
    trainer = make_trainer(
        2,
        folder,
        stage=3,
        max_steps=1,
        config={"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    )
    trainer.train()
    trainer.save_model()
    weights = {name: float(weight.double().sum()) for name, weight in facts(trainer)["weights"].items()}
    trainer.model_wrapped.destroy()
    dist.barrier()
    return [weights[name] for name in sorted(weights)]


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "deepspeed_alst" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(model.config._attn_implementation)
weights = dict(model.named_parameters())
print(*[float(weights[name].detach().double().sum()) for name in sorted(weights)])
"""


def test_a_saved_model_is_read_without_this_package(ranks2, tmp_path):
    sums = ranks2.run(save_whole, str(tmp_path))[0]
    assert "alst" not in (Path(tmp_path) / "config.json").read_text()
    environment = os.environ | {"DEEPSPEED_ALST_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    attention, numbers = done.stdout.splitlines()[-2:]
    assert attention == "sdpa"
    torch.testing.assert_close(torch.tensor([float(x) for x in numbers.split()]), torch.tensor(sums))
