"""Train a LoRA adapter (PEFT) on long sequences in a plain DeepSpeed loop, save it and load it again.

    deepspeed --num_gpus 2 examples/lora.py --deepspeed ds_configs/sp2.json --output runs/lora

The base model is frozen; only the adapter has gradients, optimizer states and a place in the saved folder.
"""

import argparse
import sysconfig
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base_model() -> LlamaForCausalLM:
    """Build a tiny byte-level Llama; in your program, ``from_pretrained``."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def documents(count: int, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Cut the sources of Python's standard library into windows of ``seq_len`` bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)[: count * seq_len]
    rows = torch.tensor(list(text)).view(-1, seq_len)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Train the adapter, save it on rank 0, and compare the model it is loaded into."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="the ds_config, ZeRO 0 to 2")
    parser.add_argument("--output", default="runs/lora", help="folder for the adapter")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args = parser.parse_args()

    torch.manual_seed(0)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(), adapter)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()  # checkpoints of a frozen model need an input with a gradient
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        training_data=documents(4 * args.steps, args.seq_len),
        config=args.deepspeed,
    )
    step, losses = 0, []
    for batch in loader:
        loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        engine.backward(loss)
        losses.append(loss.detach())
        last = engine.is_gradient_accumulation_boundary()
        engine.step()
        if last:
            step += 1
            if dist.get_rank() == 0:
                print(f"step {step:3d}/{args.steps}  loss {torch.stack(losses).mean():.4f}", flush=True)
            losses = []
        if step == args.steps:
            break

    engine.destroy()  # gives the model back as it was, without sequence parallelism
    if dist.get_rank() == 0:
        model.save_pretrained(args.output)
        loaded = PeftModel.from_pretrained(base_model(), args.output).to(engine.device)
        prompt = torch.arange(64, device=engine.device)[None]
        with torch.no_grad():
            difference = (loaded(prompt).logits - model.eval()(prompt).logits).abs().max()
        print(f"adapter in {args.output}; loaded again, its logits differ by {difference:.1e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
