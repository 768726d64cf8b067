"""Fine-tune with TRL's SFTTrainer on packed documents: several in each row, which do not attend to one another.

    deepspeed --num_gpus 2 examples/trl_sft_packed.py --deepspeed ds_configs/trainer_sp2.json --output_dir runs/sft

All arguments of trl.SFTConfig are accepted. A tiny Llama, built from a config, trains on the functions of Python's
standard library, a token a byte. Packing needs no line for sequence parallelism: rows are cut where they are, and each
document keeps its own positions and attention over the ranks.
"""

import ast
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from transformers import ByT5Tokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer


def functions(count: int) -> list[str]:
    """Return the first functions of the standard library, as text."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
        texts += filter(None, (ast.get_source_segment(source, node) for node in nodes))
        if len(texts) >= count:
            break
    return texts[:count]


def main() -> None:
    """Train, evaluate and save the model."""
    parser = HfArgumentParser(SFTConfig)
    parser.set_defaults(
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        packing=True,
        max_length=2048,
        max_steps=10,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = ByT5Tokenizer()  # a token a byte; it needs no file
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    data = Dataset.from_dict({"text": functions(400)}).train_test_split(test_size=8, seed=0)
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
