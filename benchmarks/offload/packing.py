"""Lossless packing of layer inputs: bits per value by layer.

A byte-level Llama of 2.5 million parameters, trained on the standard library's sources; then the inputs of its layers
in bf16, as they are and with 1 % of the channels 1000 times larger.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.figures import Figure, one_thread
from deepspeed_alst.kernels import bf16_codec as codec

HIDDEN, LAYERS, TOKENS = 256, 4, 256
BATCH, STEPS = 8, 60
MOST_BITS = 11.7


def layer_inputs() -> list[torch.Tensor]:
    """Train the model, and return its layers' inputs on 4,096 other tokens, ``[n]`` bf16 each."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()
    seen, other = text[: -16 * TOKENS], text[-16 * TOKENS :]
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": 256}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        ids = torch.stack([seen[at : at + TOKENS] for at in torch.randint(len(seen) - TOKENS, (BATCH,))])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found: list[torch.Tensor] = []
    for layer in model.bfloat16().model.layers:
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten()))
    with torch.no_grad():
        model(input_ids=other.view(2, -1), use_cache=False)
    return found


def size(name: str, x_n: torch.Tensor) -> Figure:
    """Return the row of one tensor, packed and unpacked."""
    n, packed_m, back_n = x_n.numel(), _packed(x_n), torch.empty_like(x_n)
    codec.unpack_(packed_m, back_n)
    exact = torch.equal(back_n.view(torch.int16), x_n.view(torch.int16))
    escapes, unused = codec.num_escapes(packed_m), -(-n // codec.SEGMENT) * codec.ESCAPES
    bits, in_use = 8 * packed_m.numel() / n, 8 * (packed_m.numel() - unused + escapes) / n
    overflow = "overflow" if codec.has_overflowed(packed_m, packed_m.numel()) else "no overflow"
    text = (
        f"{bits:.2f} bits, {in_use:.2f} in use, {escapes / n:.2%} escapes, {overflow}, {'' if exact else 'not '}exact"
    )
    return Figure(name, (text,), f"<= {MOST_BITS} bits, no overflow, exact", exact and bits <= MOST_BITS)


def _packed(x_n: torch.Tensor) -> torch.Tensor:
    packed_m = torch.empty(codec.packed_bytes(x_n.numel()), dtype=torch.uint8)
    codec.pack_(x_n, packed_m)
    return packed_m


def rows() -> Iterator[Figure]:
    """Yield all figures with their targets."""
    with one_thread():
        scale_c = torch.ones(HIDDEN, dtype=torch.bfloat16)
        scale_c[torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0))[: HIDDEN // 100]] = 1000
        for layer, x_n in enumerate(layer_inputs()):
            yield size(f"input of layer {layer}", x_n)
            yield size(
                f"input of layer {layer}, 1 % of the channels x 1000", (x_n.view(-1, HIDDEN) * scale_c).flatten()
            )
