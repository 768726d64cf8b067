"""Train, evaluate and generate in one plain DeepSpeed loop.

    deepspeed --num_gpus 2 examples/evaluate_and_generate.py --deepspeed ds_configs/sp2.json

Evaluation runs on shards like training: ``shard_dataloader`` splits the batches of your own loader. Generation runs
without sequence parallelism: every rank holds whole prompts. A tiny Llama learns the alphabet and continues "abc".
"""

import argparse
from collections.abc import Iterable

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_alst

LETTERS = 26


def alphabets(count: int, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of letters that begin anywhere in the alphabet and go on from z to a."""
    rows = [(torch.arange(seq_len) + start) % LETTERS for start in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, loader: Iterable) -> float:
    """Return the mean loss of the loader's samples, over all ranks."""
    engine.eval()
    losses = [engine(**{key: x.to(engine.device) for key, x in batch.items()}).loss for batch in loader]
    engine.train()
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


@torch.no_grad()
def generate(engine: deepspeed.DeepSpeedEngine, prompt: str, count: int) -> str:
    """Continue a prompt greedily by ``count`` letters. All ranks call this together, as ZeRO 3 needs it."""
    engine.eval()
    ids = torch.tensor([[ord(letter) - ord("a") for letter in prompt]], device=engine.device)
    mask = torch.ones_like(ids)
    made = engine.module.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    engine.train()
    return "".join(chr(ord("a") + letter) for letter in made[0, ids.shape[1] :].tolist())


def main() -> None:
    """Train the model; evaluate it and let it generate on the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="the ds_config")
    parser.add_argument("--seq-len", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, metavar="STEPS", help="evaluate every so many steps")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"vocab_size": LETTERS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_attention_heads=4, num_key_value_heads=2))
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=alphabets(4 * args.steps, args.seq_len),
        config=args.deepspeed,
    )
    held_out = alphabets(4, args.seq_len + 200)
    # Each rank's own samples, as under data parallelism.
    held_out_loader = DataLoader(held_out, batch_size=1, sampler=DistributedSampler(held_out, shuffle=False))
    held_out_loader = deepspeed_alst.shard_dataloader(held_out_loader, engine)

    step = 0
    for batch in loader:
        loss = engine(**{key: x.to(engine.device) for key, x in batch.items()}).loss
        engine.backward(loss)
        last = engine.is_gradient_accumulation_boundary()
        engine.step()
        step += last
        if last and step % args.every == 0:
            held_out_loss, letters = evaluate(engine, held_out_loader), generate(engine, "abc", 10)
            if dist.get_rank() == 0:
                losses = f"loss {loss.item():.4f}  held-out loss {held_out_loss:.4f}"
                print(f"step {step:3d}/{args.steps}  {losses}  abc -> {letters}", flush=True)
        if step == args.steps:
            break
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
