"""A tensor of the whole sequence, held as shards, gives the values and gradients of a plain one."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from benchmarks.ranks import RankError
from deepspeed_alst.distributed.mesh import build_groups
from deepspeed_alst.errors import DataError
from deepspeed_alst.whole_sequence.sequence_tensor import SequenceTensor, gather_sequence
from deepspeed_alst.whole_sequence.token_rows import Tokens

B, S, PADDED, V = 3, 7, 8, 17


def given() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(0, V, (B, S), generator=make),
        "mask": torch.rand((B, S), generator=make) > 0.3,
        "weights": torch.rand((B, S), generator=make, dtype=torch.float64),
        "linear": torch.randn((5, V), generator=make, dtype=torch.float64),
        "teacher": torch.randn((B, S, V), generator=make, dtype=torch.float64).log_softmax(-1),
        "last": torch.tensor([6, 2, 4]),
    }


def log_probs(x, g):
    return x[:, :-1].log_softmax(-1).gather(-1, g["ids"][:, 1:, None]).squeeze(-1)


def selective(x, g):
    chosen = torch.gather(x[:, :-1], dim=-1, index=g["ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in x[:, :-1]])


def row_by_row(x, g):
    pairs = zip(x[:, :-1] / 0.7, g["ids"][:, 1:], strict=True)
    return torch.stack([F.log_softmax(row, dim=-1).gather(-1, ids[:, None]).squeeze(-1) for row, ids in pairs])


def entropy(x, g):
    log_p = F.log_softmax(x, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def divergence(x, g):
    return F.kl_div(x.log_softmax(-1), g["teacher"], reduction="none", log_target=True).sum(-1)


def batch_divergence(x, g):
    return F.kl_div(x.log_softmax(-1), g["teacher"], reduction="batchmean", log_target=True)


def shifted_loss(x, g):
    logits, labels = x[:, :-1].reshape(-1, V), g["ids"].masked_fill(~g["mask"], -100)[:, 1:].reshape(-1)
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def row_losses(x, g):
    return F.cross_entropy(input=x.view(-1, V), target=g["ids"].view(-1), reduction="none"), F.softmax(input=x, dim=2)


def top(x, g):
    values, _ = x.float().double().topk(5, dim=-1)
    return values.softmax(-1).square().sum(-1)


def greatest(x, g):
    return x.max(dim=-1).values * (x.argmax(-1) == g["ids"])


def masked(x, g):
    return x[g["mask"]].logsumexp(-1)


def mean_pooled(x, g):
    return (x * g["mask"][..., None]).sum(1) / g["mask"].sum(1)[:, None]


def last_token(x, g):
    return F.linear(x, g["linear"])[torch.arange(B), g["last"]]


def of_one_row(x, g):
    return x[1, 2:5].logsumexp(-1), x[..., 3], x[:, -1].square()


def completions(x, g):
    chosen, rejected = x[:, -3:].float().double().logsumexp(-1).split([1, 2])
    return chosen.sum() - rejected.sum()


def weighted(x, g):
    return (x.tanh() * g["weights"].unsqueeze(-1)).mean(), (x.clone() * g["weights"][..., None]).mean((0, 2))


def normalized(x, g):
    h = x - x.mean(-1, keepdim=True)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * g["linear"][0] @ g["linear"].T).square().mean()


def in_place(x, g):
    y = x * 1
    y /= 2
    y.mul_(g["weights"][..., None])
    return y.logsumexp(-1)


def scaled_by_its_own(x, g):
    return (x * x.detach().logsumexp(-1).unsqueeze(-1)).sum(-1), (x * x.logsumexp(-1)[..., None]).logsumexp(-1)


def by_time(x, g):
    return x.transpose(0, 1).logsumexp(-1), x.permute(1, 0, 2)[2:].flatten(0, 1).amax(-1)


def standardized(x, g):
    """Operands of all tokens, with a gradient: a number, ``[V]``, a weight."""
    centred = (x - x.mean()) / x.std() + x.mean((0, 1))
    return F.cosine_similarity(centred, x.mean((0, 1)), dim=-1), centred @ (x.mean((0, 1))[:, None] * g["linear"].T)


def of_each_row(x, g):
    return (x[1:2] * x[1:2].mean(1, keepdim=True)).sum(-1), x - x[:, -1:], x[0, -1].logsumexp(-1)


def small_selections(x, g):
    return x[:, 0, 1], x[-1, -3:, ::2], x[0, ..., 1], x[:, :, torch.arange(V) % 3 == 0].logsumexp(-1)


def with_options(x, g):
    chosen = torch.where(condition=x > 0, input=x, other=x * 0)
    unsorted = torch.sort(x, stable=True).values[..., -2:].sum(-1) + x.var(-1, True)
    return chosen.sum(-1), unsorted, F.cosine_similarity(x1=x, x2=g["teacher"], dim=-1), x.view(-1, V).std(True)


def without_gradient(x, g):
    """What is made without a gradient stays so, also in a tile that runs later."""
    with torch.no_grad():
        p = x.softmax(-1)
    assert not x.detach().logsumexp(-1).requires_grad
    return -(p * x.log_softmax(-1)).sum(-1), (x.detach() * x).logsumexp(-1)


_FOLDER: dict = {"__name__": "__main__"}
exec(compile("def detached(x): return x.detach()", "/home/me/deepspeed/train.py", "exec"), _FOLDER)


def in_a_folder_called_deepspeed(x, g):
    """DeepSpeed's own detach keeps the gradient; a program's must not, wherever its file is."""
    return (_FOLDER["detached"](x) * x).logsumexp(-1)


def gathered(x, g):
    return gather_sequence(x).square() * g["weights"][..., None], gather_sequence(x[:, 2:])


def any_function(x, g):
    return torch.einsum("bsv,bsw->vw", x, x), x.cumsum(1), torch.cat([x, x], 1).logsumexp(-1)


PROGRAMS = [
    *(log_probs, selective, row_by_row, entropy, divergence, batch_divergence, shifted_loss, row_losses, top, greatest),
    *(masked, mean_pooled, last_token, of_one_row, completions, weighted, normalized, in_place, scaled_by_its_own),
    *(by_time, standardized, of_each_row, small_selections, with_options, without_gradient, gathered, any_function),
    in_a_folder_called_deepspeed,
]


def results(program: Callable, x: torch.Tensor, leaf: torch.Tensor, g: dict) -> list[torch.Tensor]:
    found = [each.whole() if isinstance(each, SequenceTensor) else each for each in tree_leaves(program(x, g))]
    make = torch.Generator().manual_seed(1)
    total = sum((each * torch.rand(each.shape, generator=make, dtype=each.dtype)).sum() for each in found)
    leaves = [leaf, g["weights"]]
    return [*found, *torch.autograd.grad(total, leaves, allow_unused=True)]


def compare(sp_size: int) -> None:
    groups = build_groups(sp_size, dist.new_group(backend="gloo"))
    make = torch.Generator().manual_seed(2)
    values = torch.randn((B, PADDED, V), generator=make, dtype=torch.float64)
    place = slice(groups.sp_rank * PADDED // sp_size, (groups.sp_rank + 1) * PADDED // sp_size)
    index = torch.arange(B)[:, None] * PADDED + torch.arange(S)
    noted: list[torch.Tensor] = []
    for program in PROGRAMS:
        g, other = given(), given()
        plain = values.clone().requires_grad_()
        shard = values[:, place].clone().requires_grad_()
        for each in (g, other):
            each["weights"].requires_grad_()
        tokens = Tokens(groups, B, PADDED // sp_size, noted.append)
        x = SequenceTensor.of_batch(shard.flatten(0, 1), tokens, index)
        wanted, found = results(program, plain[:, :S].contiguous(), plain, g), results(program, x, shard, other)
        grads = [torch.empty_like(shard) for _ in range(sp_size)]
        dist.all_gather(grads, found[-2] / sp_size, group=groups.sp_group)
        found[-2] = torch.cat(grads, 1)
        for one, two in zip(found, wanted, strict=True):
            if two is None:
                assert one is None
                continue
            torch.testing.assert_close(
                one, two, rtol=1e-12, atol=1e-12, msg=lambda text, p=program: f"{p.__name__}: {text}"
            )
    assert noted
    groups.destroy()


def test_values_and_gradients_are_those_of_a_plain_tensor(ranks2):
    ranks2.run(compare, 2)


class Doubled(torch.autograd.Function):
    """A program's own, which torch runs on the tensor itself."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def refuse(function: str) -> None:
    groups = build_groups(2, dist.new_group(backend="gloo"))
    tokens = Tokens(groups, 1, 4, lambda x: None)
    x = SequenceTensor.of_batch(torch.zeros(4, 6, requires_grad=True) * 1, tokens, torch.arange(8)[None])
    huge = SequenceTensor.of_batch(torch.zeros(1, 1).expand(4, 2**30), tokens, torch.arange(8)[None])
    calls = {
        "dropout": lambda: F.dropout(x, 0.5, training=True),
        "__setitem__": lambda: x.__setitem__((0, 0), 1.0),
        "mul_": lambda: x[:, :3].mul_(2),
        "fft_fft": lambda: torch.fft.fft(huge),
        "dropout1d": lambda: F.dropout1d(x, 0.5),
        "register_hook": lambda: x.register_hook(print),
        "div_": lambda: x.view(1, 8, 6).div_(2),
        "add_": lambda: x.contiguous().add_(2),
        "transpose_": lambda: x.transpose_(0, 1),
        "relu": lambda: F.relu(huge, inplace=True),
        "gather_sequence": lambda: Doubled.apply(x).logsumexp(-1).sum().backward(),
    }
    assert F.dropout(x, 0.5, training=False).shape == x.shape and "shape=[1, 8, 6]" in f"{x!r} {x}"
    try:
        calls[function]()
    finally:
        groups.destroy()


IN_PLACE = ("__setitem__", "mul_", "div_", "add_", "transpose_")


@pytest.mark.parametrize(
    "function", ["dropout", "dropout1d", "fft_fft", "register_hook", "relu", "gather_sequence", *IN_PLACE]
)
def test_what_cannot_be_right_is_refused_by_name(function, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(refuse, function)
    assert all(isinstance(each, DataError) and function in str(each) for each in caught.value.errors), caught.value
