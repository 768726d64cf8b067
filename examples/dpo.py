"""Train with a preference loss of your own (DPO) in a plain DeepSpeed loop.

    deepspeed --num_gpus 2 examples/dpo.py --deepspeed ds_configs/sp2.json

The loader gives each pair of sequences whole to all ranks of a sequence; ``log_probs`` computes this rank's shard and
returns every token's number, with its gradient. With ds_configs/sp1.json, without sequence parallelism, the same is
printed.
"""

import argparse
import sysconfig
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_alst

BETA = 0.01


def pairs(count: int, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Make pairs of bytes, ``[2, S]``: a window of Python's standard library, and with its second half shuffled."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"".join(source.read_bytes() for source in sources)[: count * seq_len]))
    shuffled = torch.Generator().manual_seed(0)
    found = []
    for index, chosen in enumerate(text.view(-1, seq_len)):
        prompt, completion = chosen.chunk(2)
        rejected = torch.cat([prompt, completion[torch.randperm(len(completion), generator=shuffled)]])
        found.append({"index": torch.tensor(index), "input_ids": torch.stack([chosen, rejected])})
    return found


def main() -> None:
    """Train, and print loss and margin of each optimizer step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="the ds_config")
    parser.add_argument("--seq-len", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed)

    # batch_size=None: a pair is a batch. Each rank has pairs of its own.
    data = pairs(2 * args.steps, args.seq_len)
    sampler = DistributedSampler(data, dist.get_world_size(), dist.get_rank(), shuffle=False)
    loader = deepspeed_alst.shard_dataloader(DataLoader(data, batch_size=None, sampler=sampler), engine, whole=True)

    def completion_log_probs(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        numbers = deepspeed_alst.log_probs(engine, {"input_ids": batch["input_ids"].to(engine.device)})
        return numbers[:, args.seq_len // 2 - 1 :].sum(1)

    # The model before the training is the reference; a second one would need its memory.
    with torch.no_grad():
        reference = {int(batch["index"]): completion_log_probs(batch) for batch in loader}

    step, totals = 0, []
    for batch in loader:
        chosen, rejected = completion_log_probs(batch) - reference[int(batch["index"])]
        margin = BETA * (chosen - rejected)
        loss = -F.logsigmoid(margin)
        engine.backward(loss)
        totals.append(torch.stack([loss, margin]).detach())
        last = engine.is_gradient_accumulation_boundary()
        engine.step()
        if last:
            step += 1
            total = torch.stack(totals).mean(0)
            dist.all_reduce(total)
            mean_loss, mean_margin = (total / dist.get_world_size()).tolist()
            if dist.get_rank() == 0:
                norm = float(engine.get_global_grad_norm())
                print(f"step {step:3d}  loss {mean_loss:.4f}  margin {mean_margin:.4f}  norm {norm:.4f}", flush=True)
            totals = []
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
