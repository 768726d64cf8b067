"""A plain ZeRO-3 loop that loads a model and says whether it was loaded sharded. It does not know deepspeed_alst."""

import argparse

import deepspeed
import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed")
parser.add_argument("--model")
parser.add_argument("--local_rank")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
# One write: the ranks share the launcher's output.
print(f"sharded at load: {all(hasattr(param, 'ds_id') for param in model.parameters())}", flush=True)
data = [{"input_ids": (ids := torch.full((40,), number)), "labels": ids} for number in range(8)]
engine, _, loader, _ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), training_data=data, config=args.deepspeed
)
for batch in loader:
    engine.backward(engine(**batch).loss)
    engine.step()
print("trained", flush=True)
