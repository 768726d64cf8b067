"""Placement of checkpointed layers' inputs: bytes on the device and on the host, per token and layer.

A Llama in bf16 on CPU, whose "device" is host memory too: the ledger separates the two by allocation owner. Without an
accelerator, DeepSpeed's offload_activations leaves all tensors in place, and transformers' offload refuses to run; the
size in torch's pinned allocator, which both use with an accelerator, is computed.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
OURS, NONE, DEEPSPEED, TRANSFORMERS = "here", "checkpointing alone", "DeepSpeed's", "transformers'"


def rows() -> Iterator[Figure]:
    """Yield all figures with their targets."""
    exact = HIDDEN * 2
    for length in LENGTHS:
        whole = _kept(NONE, length)["residual"]
        for name in (OURS, DEEPSPEED, TRANSFORMERS):
            try:
                live = _kept(name, length)
            except RuntimeError as error:
                yield Figure(f"{length} tokens, {name} offload", (str(error).split(";")[0],))
                continue
            # Besides the layers' inputs, the graph holds the last norm's tensors, offloaded or not.
            off = (whole - live["residual"]) / length
            texts, is_ours = (f"{LAYERS - off / exact:.2f} of {LAYERS} layer inputs on the device",), name == OURS
            met = not is_ours or off == (LAYERS - 1) * exact
            yield Figure(f"{length} tokens, {name} offload", texts, "1.00, the last" * is_ours, met)
            if is_ours:
                host = live["host"] / length / (LAYERS - 1)
                met = exact <= host <= 1.01 * exact
                yield Figure(f"{length} tokens, host bytes a token and layer", (f"{host:.1f}",), f"{exact}, 1 %", met)
        pinned = 2 ** (length * exact - 1).bit_length() / length
        yield Figure(f"{length} tokens, the same of torch's pinned allocator (computed)", (f"{pinned:.1f}",))


def _kept(name: str, length: int) -> dict[str, int]:
    """Return live bytes by owner between forward and backward."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    config = LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=2)
    model = build_model(config).bfloat16().train()
    model.activation_checkpointing_enable(offload=name == TRANSFORMERS)
    ids = torch.randint(0, 128, (1, length))
    with PatchSet() as undo:
        if name == OURS:
            store = ActivationStore(HostBufferPool())
            undo.callback(store.close)
            apply_checkpoint_policy(ModelSpec(model), CheckpointPolicy(store, keep_last=1), undo)
        with Ledger(model) as ledger, _context(name):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            live = ledger.timeline[-1].bytes
            loss.backward()
    return dict(live)


def _context(name: str) -> AbstractContextManager[Any]:
    if name != DEEPSPEED:
        return nullcontext()
    from deepspeed.runtime.activation_checkpointing import offload_activations

    return offload_activations.get_checkpoint_hidden_states_offloading_ctx_manager()
