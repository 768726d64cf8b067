"""Placement of checkpointed layers' inputs: bytes on the device and on the host, per token and layer.

A Llama in bf16 on CPU, whose "device" is host memory too: the ledger separates the two by allocation owner. The size in
torch's pinned allocator, which DeepSpeed's and transformers' offload use with an accelerator, is computed.
"""

from collections.abc import Iterator

import torch
from transformers import LlamaConfig

from benchmarks.cells import build_model
from benchmarks.figures import Figure
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy, apply_checkpoint_policy
from deepspeed_alst.offload.host_buffers import HostBufferPool
from deepspeed_alst.profiler.ledger import Ledger

HIDDEN, LAYERS = 768, 6
LENGTHS = (1000, 3000)


def rows() -> Iterator[Figure]:
    """Yield all figures with their targets."""
    exact = HIDDEN * 2
    for length in LENGTHS:
        whole, live = (_kept(offloads, length) for offloads in (False, True))
        # Besides the layers' inputs, the graph holds the last norm's tensors, offloaded or not.
        off = (whole["residual"] - live["residual"]) / length
        text, met = f"{LAYERS - off / exact:.2f} of {LAYERS}", off == (LAYERS - 1) * exact
        yield Figure(f"{length} tokens, layer inputs on the device", (text,), "1.00, the last", met)
        host = live["host"] / length / (LAYERS - 1)
        met = exact <= host <= 1.01 * exact
        yield Figure(f"{length} tokens, host bytes a token and layer", (f"{host:.1f}",), f"{exact}, 1 %", met)
        pinned = 2 ** (length * exact - 1).bit_length() / length
        yield Figure(f"{length} tokens, the same of torch's pinned allocator (computed)", (f"{pinned:.1f}",))


def _kept(offloads: bool, length: int) -> dict[str, int]:
    """Return live bytes by owner between forward and backward."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    config = LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=2)
    model = build_model(config).bfloat16().train()
    model.activation_checkpointing_enable()
    ids = torch.randint(0, 128, (1, length))
    with PatchSet() as undo:
        if offloads:
            store = ActivationStore(HostBufferPool())
            undo.callback(store.close)
            apply_checkpoint_policy(ModelSpec(model), CheckpointPolicy(store, keep_last=1), undo)
        with Ledger(model) as ledger:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            live = ledger.timeline[-1].bytes
            loss.backward()
    return dict(live)
