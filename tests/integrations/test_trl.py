"""TRL's SFTTrainer by keys only: its fused head scores shards, and the loss, the weights and the log are SP 1's."""

import functools
import string
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.cells import Cell, build_model, full_weight, model_config
from benchmarks.families import family_config
from benchmarks.ranks import RankError
from benchmarks.trainer import trainer_config
from deepspeed_alst.errors import AlstError, ConfigError


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
    from trl import SFTConfig, SFTTrainer

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
        args = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            deepspeed=trainer_config(Cell(stage=stage), sp_size),
            **defaults | options,
        )
        peft_config = None
        if lora:
            from peft import LoraConfig

            peft_config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
        trainer = SFTTrainer(
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


def dft(sp_size: int) -> None:
    fine_tune(sp_size, 2, loss_type="dft")


def test_what_sft_cannot_have_is_refused(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(dft, 2)
    assert all(isinstance(error, ConfigError) and "loss_type='dft'" in str(error) for error in caught.value.errors)


def refuse(name: str) -> None:
    import trl
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    rows = {
        "DPO": [{"prompt": "ab", "chosen": "cde", "rejected": "fg"}],
        "KTO": [
            {"prompt": "ab", "completion": "cde", "label": True},
            {"prompt": "a", "completion": "d", "label": False},
        ],
        "Reward": [{"chosen": "abcde", "rejected": "abfg"}],
    }.get(name, [{"prompt": "abc"}])
    generating = {"num_generations": 2, "max_completion_length": 4} if name in ("GRPO", "RLOO") else {}
    if name in ("GRPO", "RLOO"):
        generating["generation_batch_size"] = 4
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, f"{name}Config")(
            output_dir=folder,
            use_cpu=True,
            deepspeed=trainer_config(Cell(stage=2), 2),
            per_device_train_batch_size=2,
            max_steps=1,
            report_to="none",
            bf16=False,
            **generating,
        )
        config = model_config(Cell())
        config.pad_token_id, config.num_labels = 0, 1
        model = LlamaForSequenceClassification(config) if name == "Reward" else build_model(config)
        saved = f"{folder}/saved"  # whence TRL makes its reference; save_pretrained would write on rank 0 alone
        model.config.save_pretrained(saved)
        save_file(model.state_dict(), f"{saved}/model.safetensors", {"format": "pt"})
        model = type(model).from_pretrained(saved)
        reward = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if generating else {}
        trainer = getattr(trl, f"{name}Trainer")(
            model, args=args, train_dataset=Dataset.from_list(8 * rows), processing_class=tokenizer(), **reward
        )
        try:
            trainer.train()
        finally:
            getattr(trainer.model_wrapped, "destroy", lambda: None)()


@pytest.mark.parametrize("name", ["DPO", "KTO", "RLOO", "GRPO"])
def test_a_loss_of_log_probabilities_is_refused_by_the_trainers_name_and_loss_types_are_not_spoken_of(name):
    import trl

    from deepspeed_alst.integrations.hf_trainer import check_trainer

    kind = getattr(trl, f"{name}Trainer")
    for each in (kind, type("Own", (kind,), {})):
        trainer = each.__new__(each)
        trainer.compute_loss_func, trainer.args = (
            None,
            getattr(trl, f"{name}Config")(output_dir="unused", use_cpu=True, bf16=False),
        )
        with pytest.raises(ConfigError, match=f"{name}Trainer: losses of preference") as caught:
            check_trainer(trainer)
        assert "nll" not in str(caught.value)


@pytest.mark.parametrize("name", ["GRPO", "Reward"])
def test_preference_and_reinforcement_learning_are_refused_by_the_trainers_name(name, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(refuse, name)
    errors = caught.value.errors
    assert all(isinstance(error, AlstError) for error in errors), errors
    wanted = "LlamaForSequenceClassification" if name == "Reward" else f"{name}Trainer"
    assert all(wanted in str(error) for error in errors), errors
