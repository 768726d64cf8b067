"""Runs of TRL's trainers on a tiny Llama, for the tests: model, tokenizer, data and options in one place."""

import contextlib
import string
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.cells import Cell, build_model, full_weight, model_config
from benchmarks.trainer import trainer_config
from tests.multimodal import processors

OPTIONS = {
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
GENERATES = {
    "GRPO": {"num_generations": 2, "max_completion_length": 12, "beta": 0.1},
    "RLOO": {"num_generations": 2, "max_completion_length": 12, "beta": 0.1},
    "Distillation": {"max_completion_length": 12},
    "GKD": {"max_new_tokens": 12},
}
TIMES = ("runtime", "per_second", "step_time")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; no hub is asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = ["<pad>", "<eos>", "<unk>", *string.ascii_lowercase, " "]
    core = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(letters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


def rows(name: str, count: int, blocks: int = 1) -> list[dict]:
    """Rows of letters for a trainer; ``blocks`` of KTO's in a row have one label."""
    make = torch.Generator().manual_seed(5)

    def text(least: int, most: int) -> str:
        length = int(torch.randint(least, most, (), generator=make))
        return "".join(string.ascii_lowercase[n] for n in torch.randint(0, 26, (length,), generator=make).tolist())

    if name == "DPO":
        return [{"prompt": text(3, 9), "chosen": text(5, 30), "rejected": text(5, 30)} for _ in range(count)]
    if name == "KTO":
        return [{"prompt": text(3, 9), "completion": text(5, 30), "label": n // blocks % 3 > 0} for n in range(count)]
    if name == "Reward":
        return [{"chosen": text(5, 30), "rejected": text(5, 30)} for _ in range(count)]
    if name == "SFT":
        return [{"text": text(11, 50)} for _ in range(count)]
    if name == "GKD":
        pairs = [(text(3, 9), text(5, 30)) for _ in range(count)]
        roles = ("user", "assistant")
        return [
            {"prompt": pair[0], "messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]}
            for pair in pairs
        ]
    return [{"prompt": text(3, 17)} for _ in range(count)]


def save_model(folder: str, name: str, config=None, seed: int = 0) -> type:
    """Write a trainer's model into a folder, as ``save_pretrained``, which would write on rank 0 alone."""
    config = config or model_config(Cell())
    config.pad_token_id, config.eos_token_id = 0, 1
    model = build_model(config, seed)
    if name == "Reward":
        config.num_labels = 1
        torch.manual_seed(7)
        model = LlamaForSequenceClassification(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
    return type(model)


def reward_letters(completions: list[str], **_) -> list[float]:
    """Reward of completions with many of one letter."""
    return [float(each.count("a") - len(each) / 9) for each in completions]


def train(
    sp_size: int,
    name: str,
    stage: int = 2,
    lora: bool = False,
    evaluates: bool = False,
    blocks: int = 1,
    kind=None,
    config=None,
    folder: str | None = None,
    resume: str | None = None,
    images: str = "",
    **options,
) -> dict:
    """Train, and evaluate if asked for; return the log and the trained weights.

    ``images`` is a family of models of images.
    """
    import trl
    from datasets import Dataset
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if name == "GKD":
        from trl.experimental import gkd as trl
    more = {}
    with contextlib.ExitStack() as stack:
        saved, second = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
        # Before the arguments, whose ZeRO 3 builds models in shards. TRL makes its reference of it too.
        if images:
            model_class = processors.save_model(saved, images)
            data = [Dataset.from_list(processors.rows(images, count, name)) for count in (32, 4)]
        else:
            model_class = save_model(saved, name, config)
            save_model(second, name, seed=9)
            data = [Dataset.from_list(rows(name, 32, blocks)), Dataset.from_list(rows(name, 4))]
        args = getattr(trl, f"{name}Config")(
            output_dir=folder or saved,
            use_cpu=True,
            deepspeed=trainer_config(Cell(stage=stage), sp_size),
            **OPTIONS | GENERATES.get(name, {}) | options,
        )
        if name in ("GRPO", "RLOO"):
            more["reward_funcs"] = reward_letters
        if name in ("Distillation", "GKD"):
            more["teacher_model"] = model_class.from_pretrained(second)
        if lora:
            from peft import LoraConfig

            more["peft_config"] = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
        trainer = (kind or getattr(trl, f"{name}Trainer"))(
            model_class.from_pretrained(saved),
            args=args,
            train_dataset=data[0],
            eval_dataset=data[1],
            processing_class=processors.processor(images) if images else tokenizer(),
            **more,
        )
        trainer.train(resume_from_checkpoint=resume)
        if evaluates:
            trainer.evaluate()
        engine = trainer.model_wrapped
        weights = {name: full_weight(p) for name, p in engine.module.named_parameters() if p.requires_grad}
        engine.destroy()
    return {"weights": weights, "log": trainer.state.log_history}


def numbers(log: dict) -> dict:
    """Return what a line of the log says, but for times."""
    return {key: x for key, x in log.items() if isinstance(x, float) and not any(each in key for each in TIMES)}


def compare_logs(whole: list[dict], split: list[dict]) -> None:
    """Fail unless two runs logged the same numbers."""
    for one, two in zip(whole, split, strict=True):
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-4, abs=2e-5)
    assert any(line["grad_norm"] > 1e-3 for line in whole if "grad_norm" in line)


def compare(whole: dict, split: dict) -> None:
    """Fail unless two runs logged the same numbers and have the same weights."""
    compare_logs(whole["log"], split["log"])
    for key, weight in whole["weights"].items():
        assert (split["weights"][key] - weight).norm() < 1e-5 * weight.norm(), key


def log_of(folder: Path) -> list[dict]:
    """Return the log that a run's last checkpoint has."""
    import json

    states = sorted(folder.glob("checkpoint-*/trainer_state.json"))
    return json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
