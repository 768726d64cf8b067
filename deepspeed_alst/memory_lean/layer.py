"""One decoder layer as one recomputed unit, in chunks of tokens, with the sequence's keys and values resident.

Forward: K and V of all chunks; then for each chunk q, attention to them, and the rest of the layer. Backward, chunk by
chunk: the rest of the layer again, attention's backward, and q's; at the end that of K and V, whose gradients have been
summed in fp32. What is whole at any time is the layer's input or output, its gradient, K, V and their gradients.

Legend: B batch, P ranks, s tokens of a rank's shard, S = P*s, c tokens of a chunk, t of a tile, M hidden size, H query
heads, K KV heads, h and k those of a rank, D head dim of q and k, E of v.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deepspeed_alst.memory_lean.attention import attend, attend_backward, sinks_gradient
from deepspeed_alst.memory_lean.attention_kernels import Kernel, from_sample
from deepspeed_alst.memory_lean.chunks import Saved, Sizes, cut, joined, of_size
from deepspeed_alst.memory_lean.exchange import HeadExchange
from deepspeed_alst.memory_lean.parts import AttentionCall, LayerParts
from deepspeed_alst.memory_lean.rectangles import Rectangle, rectangles
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

    def chunks(self) -> list[slice]:
        """Return the chunks of a shard."""
        return of_size(0, self.shape[1], self.sizes.chunk_tokens)

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

    def pieces(self, chunk: slice) -> Iterator[tuple[tuple[Any, ...], tuple[list[Rectangle], int, Kernel]]]:
        """Yield where adjacent rows are in ``[B, h, P, c]``, and their rectangles, first in the sequence and kernel."""
        P, s, mask = self.exchange.plan.sp_size, self.shape[1], self.attention.mask
        masks = [] if mask is None else [(slice(row, row + 1), each) for row, each in enumerate(mask.rows)]
        stripes = self.exchange.own_stripes(chunk.stop - chunk.start)
        ends = list(itertools.accumulate(map(len, stripes), initial=0))
        for rank, (stripe, here) in itertools.product(range(P), zip(stripes, itertools.pairwise(ends), strict=True)):
            first = rank * s + chunk.start + stripe.start
            for samples, each in masks or [(slice(None), mask)]:
                parts = list(rectangles(first, first + len(stripe), P * s, each, self.sizes.key_block))
                yield (samples, slice(None), rank, slice(*here)), (parts, first, from_sample(self.kernel, samples))

    def forward(self, x_BsM: torch.Tensor, saves: bool) -> tuple[torch.Tensor, ...]:
        """Return the layer's output, ``[B, s, M]``, and its records; save each chunk's input if there is a backward."""
        k_BkSD, v_BkSE = self._keys_and_values(lambda index, chunk: x_BsM[:, chunk])
        whole: list[torch.Tensor] = []
        for chunk in self.chunks():
            x_BcM = x_BsM[:, chunk]
            o_BcHE, lse_BhPc = self._attend(self._queries(x_BcM, chunk), k_BkSD, v_BkSE, chunk)
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

    def _keys_and_values(self, input_of: Callable[[int, slice], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's heads of the whole sequence: ``[B, k, S, D]`` and ``[B, k, S, E]``."""
        whole: list[torch.Tensor] = []
        for index, chunk in reversed(list(enumerate(self.chunks()))):
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
            if not whole:
                P, s = self.exchange.plan.sp_size, self.shape[1]
                whole = [x.new_empty(*x.shape[:2], P, s, x.shape[4]) for x in parts]
            for x_BkPsD, x_BkPcD in zip(whole, parts, strict=True):
                x_BkPsD[:, :, :, chunk] = x_BkPcD
        k_BkPsD, v_BkPsE = whole
        return k_BkPsD.flatten(2, 3), v_BkPsE.flatten(2, 3)

    def _queries(self, x_BcM: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Return a chunk's queries, ``[B, H, c, D]``."""
        found = []
        for tile, kwargs, as_in_forward in self.tiles(chunk):
            with as_in_forward:
                found.append(self.parts.front(x_BcM[:, tile], kwargs, "q").q)
        return joined(found)

    def _attend(
        self, q_BHcD: torch.Tensor, k_BkSD: torch.Tensor, v_BkSE: torch.Tensor, chunk: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a chunk's attention output ``[B, c, H, E]``, and this rank's log-sum-exp ``[B, h, P, c]``."""
        (q_BhPcD,) = self.exchange.to_heads("q", q_BHcD)
        del q_BHcD
        sinks_H = self.attention.arguments.get("s_aux")
        sinks_h = None if sinks_H is None else sinks_H[self.exchange.own_heads()]
        o_BhPcE = q_BhPcD.new_empty(*q_BhPcD.shape[:4], v_BkSE.shape[3])
        lse_BhPc = q_BhPcD.new_empty(q_BhPcD.shape[:4], dtype=torch.promote_types(q_BhPcD.dtype, torch.float32))
        for rows, how in self.pieces(chunk):
            keys_values = k_BkSD[rows[0]], v_BkSE[rows[0]]
            o_BhPcE[rows], lse_BhPc[rows] = attend(q_BhPcD[rows], *keys_values, *how, sinks_h)
        (o_BHcE,) = self.exchange.to_tokens("q", chunk.stop - chunk.start, o_BhPcE)
        return o_BHcE.transpose(1, 2).contiguous(), lse_BhPc

    def backward(self, dx_BsM: torch.Tensor, *of_records: torch.Tensor) -> list[torch.Tensor | None]:
        """Turn the output's gradient into the input's, in place; return those of the weights."""
        grads = [
            x.unflatten(0, self.shape) if flat else x for (_, flat), x in zip(self.records, of_records, strict=True)
        ]
        of_outputs = [dx_BsM, *grads]
        k_BkSD, v_BkSE = self._keys_and_values(lambda index, chunk: self._input(index))
        wide = torch.promote_types(k_BkSD.dtype, torch.float32)
        dk_BkSD, dv_BkSE = (torch.zeros_like(x, dtype=wide) for x in (k_BkSD, v_BkSE))
        chunks = self.chunks()
        passes = 3 * sum(len(of_size(chunk.start, chunk.stop, self.sizes.tile_tokens)) for chunk in chunks)
        sums = WeightGradients(self.weights, passes, fp32=True)
        with without_hooks(self.weights):
            for index, chunk in reversed(list(enumerate(chunks))):
                of_chunk = [x[:, chunk] for x in of_outputs]
                self._chunk_backward(index, chunk, of_chunk, (k_BkSD, v_BkSE), (dk_BkSD, dv_BkSE), sums)
            narrow = k_BkSD.dtype
            del k_BkSD, v_BkSE
            P, s = self.exchange.plan.sp_size, self.shape[1]
            grads = [x.unflatten(2, (P, s)) for x in (dk_BkSD, dv_BkSE)]
            del dk_BkSD, dv_BkSE
            for index, chunk in reversed(list(enumerate(chunks))):
                of_chunk = [x[:, :, :, chunk].to(narrow) for x in grads]
                dk_dv = self.exchange.to_tokens("kv", chunk.stop - chunk.start, *of_chunk)
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
        keys_values: tuple[torch.Tensor, torch.Tensor],
        grads: tuple[torch.Tensor, torch.Tensor],
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
            o_BcHE, lse_BhPc = self._attend(q_BHcD, *keys_values, chunk)
        do_BcHE = self._tail_backward(x_BcM, o_BcHE, chunk, of_outputs, sums)
        del x_BcM
        # One exchange for the three: attention's output comes back with its gradient.
        sent = (q_BHcD, o_BcHE.transpose(1, 2), do_BcHE.transpose(1, 2))
        del q_BHcD, o_BcHE, do_BcHE
        q_BhPcD, o_BhPcE, do_BhPcE = self.exchange.to_heads("qqq", *sent)
        del sent
        dq_BhPcD = torch.empty(q_BhPcD.shape, dtype=q_BhPcD.dtype, device=q_BhPcD.device)
        for rows, how in self.pieces(chunk):
            of_rows, of_output = ([x[rows] for x in each] for each in ((do_BhPcE, q_BhPcD), (o_BhPcE, lse_BhPc)))
            of_keys, of_grads = ([x[rows[0]] for x in each] for each in (keys_values, grads))
            dq_BhPcD[rows] = attend_backward(*of_rows, *of_keys, *of_output, *of_grads, *how)
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
