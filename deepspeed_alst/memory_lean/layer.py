"""One decoder layer as one recomputed unit, in chunks of tokens, with the sequence's keys and values resident.

Forward: K and V of all chunks; then for each chunk q, attention to them, and the rest of the layer. Backward, chunk by
chunk: the rest of the layer again, attention's backward, and q's; at the end that of K and V, whose gradients have been
summed in fp32. What is whole at any time is the layer's input or output, its gradient, K, V and their gradients.

Legend: B batch, P ranks, s tokens of a rank's shard, S = P*s, c tokens of a chunk, t of a tile, M hidden size, H query
heads, K KV heads, h and k those of a rank, D head dim of q and k, E of v; R rows of K and V here, W = D + E
(key_blocks.py).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deepspeed_alst.attention.attention_kernels import Kernel
from deepspeed_alst.attention.rectangle_attention import sinks_gradient
from deepspeed_alst.attention.rectangles import of_size
from deepspeed_alst.memory_lean.chunks import Saved, Sizes, cut, joined
from deepspeed_alst.memory_lean.core import Core
from deepspeed_alst.memory_lean.exchange import HeadExchange
from deepspeed_alst.memory_lean.key_blocks import KeyBlocks
from deepspeed_alst.memory_lean.parts import AttentionCall, LayerParts
from deepspeed_alst.random_draws.draw_mode import Branch
from deepspeed_alst.tiling.weight_gradients import WeightGradients, without_hooks


@dataclasses.dataclass
class LeanCall:
    """One call of a layer: its arguments, how it is cut, and what its backward needs.

    Attributes:
        new_group: called for each chunk; returns a function that saves one of its tensors.
    """

    parts: LayerParts
    exchange: HeadExchange
    sizes: Sizes
    kwargs: dict[str, Any]
    attention: AttentionCall  # of a few tokens, for its mask, sinks and sizes
    kernel: Kernel
    shape: tuple[int, int]  # B and s
    in_place: bool  # the output takes the input's memory, if it has its dtype
    drawing: Branch
    autocast: Callable[[], Any]
    new_group: Callable[[], Callable[[torch.Tensor], Saved]]
    saves_output: bool  # saves attention's output and log-sum-exp
    keys: Sequence[str]  # of what the model's forward records inside of layers
    weights: Sequence[torch.Tensor]
    inputs: list[Saved] = dataclasses.field(default_factory=list)  # of each chunk
    outputs: list[tuple[Saved, Saved]] = dataclasses.field(default_factory=list)
    records: list[tuple[str, bool]] = dataclasses.field(default_factory=list)  # their keys, and which are flat

    @functools.cached_property
    def chunks(self) -> list[slice]:
        """Chunks of a shard."""
        return of_size(0, self.shape[1], self.sizes.chunk_tokens)

    @functools.cached_property
    def core(self) -> Core:
        """Attention, and K and V's blocks."""
        head_dims, key_block = [x.shape[3] for x in (self.attention.k, self.attention.v)], self.sizes.key_block
        blocks = KeyBlocks(self.exchange, self.chunks, head_dims, key_block)
        return Core(self.exchange, blocks, self.shape[1], self.attention.mask, self.kernel, key_block)

    def tiles(self, chunk: slice) -> Iterator[tuple[slice, dict[str, Any], Any]]:
        """Yield a chunk's tiles, in its own tokens, the layer's arguments for them and a context to run them in."""
        for tile in of_size(chunk.start, chunk.stop, self.sizes.tile_tokens):
            kwargs = {name: cut(value, tile, self.shape[1]) for name, value in self.kwargs.items()}
            yield slice(tile.start - chunk.start, tile.stop - chunk.start), kwargs, self._as_in_forward(tile)

    @contextlib.contextmanager
    def _as_in_forward(self, tile: slice) -> Iterator[None]:
        """Run a tile with the random numbers and the autocast of the layer's forward."""
        with self.autocast(), self.drawing(self._rows(tile)):
            yield

    def _rows(self, tile: slice) -> Any:
        """Return a tile's indices among the shard's tokens, flattened with the batch."""
        B, s = self.shape
        if B == 1:
            return tile
        of_batch = torch.arange(B * s, device=self.attention.q.device).view(B, s)
        return of_batch[:, tile].flatten()

    def forward(self, x_BsM: torch.Tensor, saves: bool) -> tuple[torch.Tensor, ...]:
        """Return the layer's output, ``[B, s, M]``, and its records; save each chunk's input if there is a backward."""
        kv_RBkW = self._keys_and_values(lambda index, chunk: x_BsM[:, chunk])
        whole: list[torch.Tensor] = []
        for chunk in self.chunks:
            x_BcM = x_BsM[:, chunk]
            o_BcHE, lse_BhPc = self._attend(self._queries(x_BcM, chunk), kv_RBkW, chunk)
            if saves:
                save = self.new_group()
                self.inputs.append(save(x_BcM))
                if self.saves_output:
                    self.outputs.append((save(o_BcHE), save(lse_BhPc)))
            for tile, kwargs, as_in_forward in self.tiles(chunk):
                with as_in_forward:
                    y_BtM, records = self.parts.tail(x_BcM[:, tile], o_BcHE[:, tile], kwargs, keys=self.keys)
                parts = [y_BtM, *(each.x for each in records)]
                whole = whole or self._room_for(parts, x_BsM)
                for x, part in zip(whole, parts, strict=True):
                    x[:, chunk][:, tile] = part
                self.records = [(each.key, each.is_flat) for each in records]
                del y_BtM, records, parts, part
        y_BsM, *recorded = whole
        y_BsM = y_BsM.data  # autograd takes a tensor of its own for no view of the input
        flat = (is_flat for _, is_flat in self.records)
        return y_BsM, *(x.flatten(0, 1) if is_flat else x for x, is_flat in zip(recorded, flat, strict=True))

    def _room_for(self, parts: Sequence[torch.Tensor], x_BsM: torch.Tensor) -> list[torch.Tensor]:
        """Return whole tensors for a tile's output, in the input's memory if it may be, and for its records."""
        first, *rest = parts
        y_BsM = x_BsM if self.in_place and first.dtype == x_BsM.dtype else first.new_empty(x_BsM.shape)
        return [y_BsM, *(x.new_empty(*self.shape, *x.shape[2:]) for x in rest)]

    def _input(self, index: int) -> torch.Tensor:
        """Return a chunk's input, and start to bring the one before back."""
        x_BcM = self.inputs[index]()
        if index:
            self.inputs[index - 1].prefetch()
        return x_BcM

    def _keys_and_values(self, input_of: Callable[[int, slice], torch.Tensor]) -> torch.Tensor:
        """Return this rank's part of the sequence's keys and values, ``[R, B, k, W]``."""
        kv_RBkW = None
        for index, chunk in reversed(list(enumerate(self.chunks))):
            x_BcM, found = input_of(index, chunk), list[list[torch.Tensor]]()
            for tile, kwargs, as_in_forward in self.tiles(chunk):
                with as_in_forward:
                    call = self.parts.front(x_BcM[:, tile], kwargs, "kv")
                found.append([call.k, call.v])
                del call
            k_BKcD, v_BKcE = (joined(each) for each in zip(*found, strict=True))
            del x_BcM, found
            parts = self.exchange.to_heads("kv", k_BKcD, v_BKcE)
            del k_BKcD, v_BKcE
            kv_RBkW = self.core.blocks.put(kv_RBkW, index, *parts)
            del parts
        assert kv_RBkW is not None
        return kv_RBkW

    def _queries(self, x_BcM: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Return a chunk's queries, ``[B, H, c, D]``."""
        found = []
        for tile, kwargs, as_in_forward in self.tiles(chunk):
            with as_in_forward:
                found.append(self.parts.front(x_BcM[:, tile], kwargs, "q").q)
        return joined(found)

    def _attend(self, q_BHcD: torch.Tensor, kv_RBkW: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a chunk's attention output ``[B, c, H, E]``, and this rank's log-sum-exp ``[B, h, P, c]``."""
        (q_BhPcD,) = self.exchange.to_heads("q", q_BHcD)
        del q_BHcD
        sinks_H = self.attention.arguments.get("s_aux")
        sinks_h = None if sinks_H is None else sinks_H[self.exchange.own_heads()]
        o_BhPcE, lse_BhPc = self.core.forward(chunk, q_BhPcD, kv_RBkW, self.attention.v.shape[3], sinks_h)
        del q_BhPcD
        (o_BHcE,) = self.exchange.to_tokens("q", chunk.stop - chunk.start, o_BhPcE)
        return o_BHcE.transpose(1, 2).contiguous(), lse_BhPc

    def backward(self, dx_BsM: torch.Tensor, *of_records: torch.Tensor) -> list[torch.Tensor | None]:
        """Turn the output's gradient into the input's, in place; return those of the weights."""
        grads = [
            x.unflatten(0, self.shape) if flat else x for (_, flat), x in zip(self.records, of_records, strict=True)
        ]
        of_outputs = [dx_BsM, *grads]
        kv_RBkW = self._keys_and_values(lambda index, chunk: self._input(index))
        sums_RBkW = torch.zeros_like(kv_RBkW, dtype=torch.promote_types(kv_RBkW.dtype, torch.float32))
        chunks, narrow = self.chunks, kv_RBkW.dtype
        passes = 3 * sum(len(of_size(chunk.start, chunk.stop, self.sizes.tile_tokens)) for chunk in chunks)
        sums = WeightGradients(self.weights, passes, fp32=True)
        with without_hooks(self.weights):
            for index, chunk in reversed(list(enumerate(chunks))):
                of_chunk = [x[:, chunk] for x in of_outputs]
                self._chunk_backward(index, chunk, of_chunk, kv_RBkW, sums_RBkW, sums)
            del kv_RBkW
            for index, chunk in reversed(list(enumerate(chunks))):
                c = chunk.stop - chunk.start
                of_chunk = [x.to(narrow) for x in self.core.blocks.of_chunk(sums_RBkW, index, c)]
                dk_dv = self.exchange.to_tokens("kv", c, *of_chunk)
                del of_chunk
                x_BcM = self._input(index)
                for tile, kwargs, as_in_forward in self.tiles(chunk):
                    with as_in_forward:
                        x_BtM, call = self._front_with_graph(x_BcM[:, tile], kwargs, "kv")
                    of_tile = [x[:, :, tile] for x in dk_dv]
                    self._front_backward(x_BtM, [call.k, call.v], of_tile, dx_BsM[:, chunk][:, tile], sums)
                    del x_BtM, call
        return sums.result()

    def _chunk_backward(
        self,
        index: int,
        chunk: slice,
        of_outputs: Sequence[torch.Tensor],
        kv_RBkW: torch.Tensor,
        sums_RBkW: torch.Tensor,
        sums: WeightGradients,
    ) -> None:
        """Backward of a chunk but for its keys and values, whose gradients it adds for the whole sequence."""
        x_BcM, dx_BcM = self._input(index), of_outputs[0]
        fronts = []
        for tile, kwargs, as_in_forward in self.tiles(chunk):
            with as_in_forward:
                x_BtM, call = self._front_with_graph(x_BcM[:, tile], kwargs, "q")
            fronts.append((x_BtM, call.q))
        q_BHcD = joined([q.detach() for _, q in fronts])
        if self.saves_output:
            o_BcHE, lse_BhPc = (saved() for saved in self.outputs[index])
            for saved in self.outputs[index - 1] if index else ():
                saved.prefetch()
        else:
            o_BcHE, lse_BhPc = self._attend(q_BHcD, kv_RBkW, chunk)
        do_BcHE = self._tail_backward(x_BcM, o_BcHE, chunk, of_outputs, sums)
        del x_BcM
        # One exchange for the three: attention's output comes back with its gradient.
        sent = (q_BHcD, o_BcHE.transpose(1, 2), do_BcHE.transpose(1, 2))
        del q_BHcD, o_BcHE, do_BcHE
        q_BhPcD, o_BhPcE, do_BhPcE = self.exchange.to_heads("qqq", *sent)
        del sent
        dq_BhPcD = self.core.backward(chunk, (do_BhPcE, q_BhPcD, o_BhPcE, lse_BhPc), kv_RBkW, sums_RBkW)
        if (sinks_H := self.attention.arguments.get("s_aux")) in sums:
            heads_here, grad_H = self.exchange.own_heads(), torch.zeros_like(sinks_H, dtype=lse_BhPc.dtype)
            grad_H[heads_here] = sinks_gradient(do_BhPcE, o_BhPcE, lse_BhPc, sinks_H[heads_here])
            sums.add(sinks_H, grad_H)
        del q_BhPcD, o_BhPcE, do_BhPcE, lse_BhPc
        (dq_BHcD,) = self.exchange.to_tokens("q", chunk.stop - chunk.start, dq_BhPcD)
        del dq_BhPcD
        for (tile, _, _), (x_BtM, q_BHtD) in zip(self.tiles(chunk), fronts, strict=True):
            self._front_backward(x_BtM, [q_BHtD], [dq_BHcD[:, :, tile]], dx_BcM[:, tile], sums)

    def _front_with_graph(
        self, x_BtM: torch.Tensor, kwargs: dict[str, Any], need: str
    ) -> tuple[torch.Tensor, AttentionCall]:
        x_BtM = x_BtM.detach().requires_grad_()
        with torch.enable_grad():
            return x_BtM, self.parts.front(x_BtM, kwargs, need)

    def _front_backward(
        self,
        x_BtM: torch.Tensor,
        ends: list[torch.Tensor],
        grads: list[torch.Tensor],
        dx_BtM: torch.Tensor,
        sums: WeightGradients,
    ) -> None:
        """Add the gradients of a tile's front to the input's and to the weights'."""
        grads = [grad.to(end.dtype) for end, grad in zip(ends, grads, strict=True)]
        found = torch.autograd.grad(ends, [x_BtM, *self.weights], grads, allow_unused=True)
        dx_BtM += found[0]
        for weight, grad in zip(self.weights, found[1:], strict=True):
            sums.add(weight, grad)

    def _tail_backward(
        self,
        x_BcM: torch.Tensor,
        o_BcHE: torch.Tensor,
        chunk: slice,
        of_outputs: Sequence[torch.Tensor],
        sums: WeightGradients,
    ) -> torch.Tensor:
        """Run a chunk's tail again and backward: turn dy into its part of dx, in place; return attention's gradient."""
        do_BcHE, dx_BcM = torch.empty_like(o_BcHE), of_outputs[0]
        for tile, kwargs, as_in_forward in self.tiles(chunk):
            x_BtM, o_BtHE = (x[:, tile].detach().requires_grad_() for x in (x_BcM, o_BcHE))
            with torch.enable_grad(), as_in_forward:
                y_BtM, records = self.parts.tail(x_BtM, o_BtHE, kwargs, sums, self.keys)
            pairs = zip([y_BtM, *(each.x for each in records)], of_outputs, strict=True)
            ends, grads = zip(*((end, grad[:, tile]) for end, grad in pairs if end.requires_grad), strict=True)
            inputs = [x_BtM, o_BtHE, *self.weights]
            found = torch.autograd.grad(ends, inputs, grads, allow_unused=True)
            del y_BtM, records, pairs, ends, grads, inputs
            dx_BcM[:, tile], do_BcHE[:, tile] = found[:2]
            for weight, grad in zip(self.weights, found[2:], strict=True):
                sums.add(weight, grad)
            del found
        return do_BcHE
