"""TRL's trainers of preference and reinforcement learning by keys only: loss, log and weights are SP 1's."""

import string
import tempfile

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForSequenceClassification

from benchmarks.cells import Cell, build_model, full_weight, model_config
from benchmarks.ranks import RankError
from benchmarks.trainer import trainer_config
from deepspeed_alst.errors import ConfigError
from tests.integrations.test_trl import tokenizer


def rows(name: str, count: int, blocks: int = 1):
    from datasets import Dataset

    make = torch.Generator().manual_seed(5)

    def text(least: int, most: int) -> str:
        length = int(torch.randint(least, most, (), generator=make))
        return "".join(string.ascii_lowercase[n] for n in torch.randint(0, 26, (length,), generator=make).tolist())

    if name == "DPO":
        found = [{"prompt": text(3, 9), "chosen": text(5, 30), "rejected": text(5, 30)} for _ in range(count)]
    elif name == "KTO":
        found = [{"prompt": text(3, 9), "completion": text(5, 30), "label": n // blocks % 3 > 0} for n in range(count)]
    elif name == "Reward":
        found = [{"chosen": text(5, 30), "rejected": text(5, 30)} for _ in range(count)]
    elif name == "SFT":
        found = [{"text": text(11, 50)} for _ in range(count)]
    else:
        found = [{"prompt": text(3, 17)} for _ in range(count)]
    return Dataset.from_list(found)


def train_case(sp_size: int, case: str) -> dict:
    return train(sp_size, case.split(",")[0], **CASES[case])


def train(
    sp_size: int,
    name: str,
    stage: int = 2,
    lora: bool = False,
    evaluates: bool = False,
    blocks: int = 1,
    kind=None,
    **options,
) -> dict:
    import trl
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    generates = name in ("GRPO", "RLOO")
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if generates:
        defaults |= {"num_generations": 2, "max_completion_length": 12, "beta": 0.1}
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(Cell())
        config.pad_token_id, config.eos_token_id = 0, 1
        model = build_model(config)
        if name == "Reward":
            config.num_labels = 1
            torch.manual_seed(7)
            model = LlamaForSequenceClassification(config)
        saved = f"{folder}/saved"  # whence TRL makes its reference; save_pretrained would write on rank 0 alone
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(saved)
        save_file(model.state_dict(), f"{saved}/model.safetensors", {"format": "pt"})
        args = getattr(trl, f"{name}Config")(
            output_dir=folder, use_cpu=True, deepspeed=trainer_config(Cell(stage=stage), sp_size), **defaults | options
        )
        model = type(model).from_pretrained(saved)
        more = {}
        if generates:
            more["reward_funcs"] = lambda completions, **_: [
                float(each.count("a") - len(each) / 9) for each in completions
            ]
        if lora:
            from peft import LoraConfig

            more["peft_config"] = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
        trainer = (kind or getattr(trl, f"{name}Trainer"))(
            model,
            args=args,
            train_dataset=rows(name, 32, blocks),
            eval_dataset=rows(name, 4),
            processing_class=tokenizer(),
            **more,
        )
        trainer.train()
        if evaluates:
            trainer.evaluate()
        engine = trainer.model_wrapped
        weights = {name: full_weight(p) for name, p in engine.module.named_parameters() if p.requires_grad}
        engine.destroy()
    return {"weights": weights, "log": trainer.state.log_history}


CASES = {
    "DPO": {},
    "DPO, its reference without the adapter, evaluated": {"lora": True, "evaluates": True},
    "DPO, ZeRO 3, evaluated": {"stage": 3, "evaluates": True},
    "DPO, IPO's loss": {"loss_type": "ipo"},
    "GRPO, evaluated": {"evaluates": True},
    "GRPO, ZeRO 3, LoRA": {"stage": 3, "lora": True},
    "RLOO": {},
    "KTO": {"loss_type": "apo_zero_unpaired", "evaluates": True},
    "KTO, batches of one label": {
        **{"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
        **{"max_steps": 3, "blocks": 8},
    },
    "Reward, evaluated": {"evaluates": True, "center_rewards_coefficient": 0.1},
    "Reward, ZeRO 3, LoRA": {"stage": 3, "lora": True},
    "SFT": {"loss_type": "dft", "evaluates": True},
}
TIMES = ("runtime", "per_second", "step_time")


def numbers(log: dict) -> dict:
    return {key: x for key, x in log.items() if isinstance(x, float) and not any(each in key for each in TIMES)}


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_at_sp2_logs_and_trains_as_at_sp1(case, ranks2):
    compare(*(ranks2.run(train_case, sp, case)[0] for sp in (1, 2)))


@pytest.mark.parametrize("case", ["DPO", "GRPO, evaluated"])
def test_a_trainer_on_four_ranks_logs_and_trains_as_at_sp1(case, ranks4):
    whole, *split = (ranks4.run(train_case, sp, case)[0] for sp in (1, 2, 4))
    for each in split:
        compare(whole, each)


def compare(whole: dict, split: dict) -> None:
    for one, two in zip(whole["log"], split["log"], strict=True):
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-4, abs=2e-5)
    for key, weight in whole["weights"].items():
        assert (split["weights"][key] - weight).norm() < 1e-5 * weight.norm(), key
    assert any(line["grad_norm"] > 1e-3 for line in whole["log"] if "grad_norm" in line)


@pytest.mark.parametrize(
    ("name", "options"),
    [("KTO", {"loss_type": "kto"}), ("GRPO", {"top_entropy_quantile": 0.5})],
)
def test_a_loss_made_of_the_batches_of_all_ranks_is_refused(name, options, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(train_refused, name, options)
    assert all(isinstance(each, ConfigError) and next(iter(options)) in str(each) for each in caught.value.errors)


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


def train_refused(name: str, options: dict) -> None:
    train(2, name, **options)
