"""Train a causal language model on long documents with the unmodified Hugging Face Trainer.

    deepspeed --num_gpus 2 examples/hf_trainer.py --deepspeed ds_configs/trainer_sp2.json --output_dir runs/hf

All arguments of transformers.TrainingArguments are accepted. Without --model and --data, a tiny byte-level Llama, built
from a config, trains on the sources of Python's standard library. A run that was stopped resumes from --output_dir.
"""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class Arguments:
    """Arguments of this script besides the Trainer's."""

    model: str | None = None
    """Hub name or local folder; default: a tiny byte-level Llama."""

    data: Path | None = None
    """A .jsonl (key "text") or .txt file; default: Python's standard library."""

    seq_len: int = 2048
    """Maximum sequence length in tokens."""


def read_texts(path: Path | None) -> list[str]:
    """Read the documents: "text" of each .jsonl line, a .txt as one, or the standard library's sources."""
    if path is None:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return [source.read_text(encoding="utf-8") for source in sources]
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
    return [content]


def windows(texts: list[str], tokenize, seq_len: int) -> list[dict[str, list[int]]]:
    """Cut texts into windows of at most ``seq_len`` tokens; drop those shorter than half of it."""
    cuts = [ids[first : first + seq_len] for ids in map(tokenize, texts) for first in range(0, len(ids), seq_len)]
    return [{"input_ids": cut, "labels": cut} for cut in cuts if len(cut) >= seq_len // 2]


def collate(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad samples on the right; padding has label -100."""
    ids, labels = ([torch.tensor(sample[key]) for sample in samples] for key in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True, padding_value=0),
    }


def build(name: str | None):
    """Return the model and a function that tokenizes text."""
    if name is None:
        sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        tokens = {"bos_token_id": None, "eos_token_id": None}
        config = LlamaConfig(**sizes, **heads, **tokens, max_position_embeddings=1 << 20, use_cache=False)
        return LlamaForCausalLM(config), lambda text: list(text.encode("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name), lambda text: tokenizer(text)["input_ids"]


def main() -> None:
    """Train, evaluate and save the model."""
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(
        use_cpu=not torch.cuda.is_available(),
        max_steps=10,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        activation_checkpointing=True,
        logging_steps=1,
        report_to="none",
    )
    own, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model, tokenize = build(own.model)
    samples = windows(read_texts(own.data), tokenize, own.seq_len)
    held_out = min(8, max(1, len(samples) // 50))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=samples[held_out:],
        eval_dataset=samples[:held_out],
        data_collator=collate,
    )
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
