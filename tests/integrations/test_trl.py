"""TRL's SFTTrainer by keys only: its fused head scores shards, and the loss, the weights and the log are SP 1's."""

import functools
import string
import tempfile

import pytest
import torch
import trl

from benchmarks.cells import Cell, build_model, full_weight, model_config
from benchmarks.families import family_config
from benchmarks.trainer import trainer_config
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.integrations.hf_trainer import check_trainer


def tokenizer():
    """One token a letter; no hub is asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", "<unk>", *string.ascii_lowercase, " "]
    core = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(letters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(count: int):
    from datasets import Dataset

    make = torch.Generator().manual_seed(5)
    rows = []
    for index in range(count):
        length = 11 + (index * 13) % 40
        letters = torch.randint(0, 26, (length,), generator=make).tolist()
        rows.append({"text": "".join(string.ascii_lowercase[n] for n in letters)})
    return Dataset.from_list(rows)


def fine_tune(sp_size: int, stage: int, lora: bool = False, config=None, **options) -> dict:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    with tempfile.TemporaryDirectory() as folder:
        defaults = {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "optim": "sgd",
            "learning_rate": 0.5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataset_num_proc": None,
        }
        args = trl.SFTConfig(
            output_dir=folder,
            use_cpu=True,
            deepspeed=trainer_config(Cell(stage=stage), sp_size),
            **defaults | options,
        )
        peft_config = None
        if lora:
            from peft import LoraConfig

            peft_config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
        trainer = trl.SFTTrainer(
            model=build_model(config or model_config(Cell())),
            args=args,
            train_dataset=texts(24),
            eval_dataset=texts(3),
            processing_class=tokenizer(),
            peft_config=peft_config,
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        engine = trainer.model_wrapped
        weights = {name: full_weight(p) for name, p in engine.module.named_parameters() if p.requires_grad}
        keys = [key for key in ("loss", "grad_norm", "aux_loss") if key != "aux_loss" or config is not None]
        log = [[line[key] for key in keys] for line in trainer.state.log_history if "loss" in line]
        engine.destroy()
    return {"log": log, "eval_loss": loss, "weights": weights}


PACKING = {"packing": True, "max_length": 64}


@pytest.mark.parametrize(
    ("stage", "options"),
    [pytest.param(2, {}, marks=pytest.mark.slow), (3, {}), (2, PACKING)],
    ids=["2", "3", "packing"],
)
def test_sft_at_sp2_is_sft_at_sp1(stage, options, ranks2):
    whole, split = (ranks2.run(functools.partial(fine_tune, **options), sp_size, stage)[0] for sp_size in (1, 2))
    assert [x for line in split["log"] for x in line] == pytest.approx(
        [x for line in whole["log"] for x in line], rel=2e-5
    )
    assert split["eval_loss"] == pytest.approx(whole["eval_loss"], rel=2e-5)
    for name, weight in whole["weights"].items():
        assert (split["weights"][name] - weight).norm() < 1e-5 * weight.norm(), name
    assert whole["log"][0][0] > whole["log"][-1][0] + 0.05


def mixture(sp_size: int) -> dict:
    return fine_tune(sp_size, 2, config=family_config("olmoe"), router_aux_loss_coef=1.0)


def test_the_routers_loss_of_a_mixture(ranks2):
    # TRL's fused head takes Mixtral's function for every family, and adds the loss to its own.
    whole, split = (ranks2.run(mixture, sp_size)[0] for sp_size in (1, 2))
    for one, other in zip([*split["log"], [split["eval_loss"]]], [*whole["log"], [whole["eval_loss"]]], strict=True):
        assert one == pytest.approx(other, rel=2e-5)
    for name, weight in whole["weights"].items():
        assert (split["weights"][name] - weight).norm() < 1e-5 * weight.norm(), name


def test_a_loss_of_other_outputs_is_refused_by_the_trainers_name():
    kind = trl.DistillationTrainer
    for each in (kind, type("Own", (kind,), {})):
        trainer = each.__new__(each)
        trainer.compute_loss_func, trainer.args = (
            None,
            trl.DistillationConfig(output_dir="unused", use_cpu=True, bf16=False),
        )
        with pytest.raises(ConfigError, match="DistillationTrainer: it needs outputs"):
            check_trainer(trainer)
