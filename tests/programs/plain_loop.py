"""A plain DeepSpeed loop with one mistake in it, named on the command line. It does not know deepspeed_alst."""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

case = next((word for word in sys.argv[1:] if not word.startswith("-")), "none")

ds_config = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "sequence_parallel_size": 2,
    "alst": {"pad_to_multiple_of": 2},
}
sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
config = LlamaConfig(**sizes, **heads)
core = "sdpa"

if case == "world":
    ds_config |= {"sequence_parallel_size": 3, "alst": {}}
elif case == "key":
    ds_config["alst"] = {"pad_to_multiple": 2, "memory_lean_layer": 1}
elif case == "everything":  # that may write files; DISK is where the offload may
    offload = {"nvme_path": os.environ["DISK"], "host_budget": 4096, "keep_last": 0}
    ds_config["alst"] |= {"tiled_mlp_compute": {"tile_tokens": 4}, "activation_checkpoint_cpu_offload": offload}
elif case == "eager":
    core = "eager"
elif case == "model":
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, is_causal=False)


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if case == "dataset" and dist.get_rank() == 1 and index == 3:
            raise OSError("document 3 cannot be read")
        ids = torch.full((16,), index)
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=core)
    data = Samples()
    print("start\n", end="", flush=True)  # one write, as ranks share the output
    own_loader = case in ("unsharded", "identical", "dataset")
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=None if own_loader else data,
        config=ds_config,
    )
    if own_loader:
        sampler = torch.utils.data.SequentialSampler(data)
        if case == "dataset":
            sampler = torch.utils.data.DistributedSampler(data, shuffle=False)
        loader = torch.utils.data.DataLoader(data, batch_size=1, sampler=sampler)
    if case in ("identical", "dataset"):
        import deepspeed_alst

        loader = deepspeed_alst.shard_dataloader(loader, engine)
    for batch in loader:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
    print("trained", flush=True)


if __name__ == "__main__":
    main()
