"""DeepSpeed's tiles under their signatures: value and gradients of the same function, untiled."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from deepspeed_alst.errors import ShapeError
from deepspeed_alst.integrations.hf_upstream import tiled_logits_loss, tiled_mlp

M, V = 6, 11


def mlp_and_input(shape, requires_grad=True):
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(M, 9), torch.nn.GELU(), torch.nn.Linear(9, M)).double()
    return mlp, torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def apply(mlp, x):
    return mlp(x)


def gradients(output, incoming, *tensors):
    return torch.autograd.grad(output, tensors, incoming)


@pytest.mark.parametrize("shape", [(2, 13, M), (13, M), (3, 2, 5, M)], ids=["BSM", "experts", "4-dim"])
@pytest.mark.parametrize("num_tiles", [1, 4, 12, 40])
def test_tiles_of_an_mlp_are_the_mlp(shape, num_tiles):
    mlp, x = mlp_and_input(shape)
    incoming = torch.randn(shape, dtype=torch.float64)
    tiled = tiled_mlp(apply, mlp, x, num_tiles, list(mlp.parameters()))
    torch.testing.assert_close(tiled, mlp(x))
    torch.testing.assert_close(
        gradients(tiled, incoming, x, *mlp.parameters()), gradients(mlp(x), incoming, x, *mlp.parameters())
    )


def test_an_input_that_needs_no_gradient_still_gives_the_weights_theirs():
    mlp, x = mlp_and_input((2, 13, M), requires_grad=False)
    incoming = torch.randn(2, 13, M, dtype=torch.float64)
    tiled = gradients(tiled_mlp(apply, mlp, x, 5, None), incoming, *mlp.parameters())
    torch.testing.assert_close(tiled, gradients(mlp(x), incoming, *mlp.parameters()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_tiles_inside_a_checkpoint(reentrant):
    mlp, x = mlp_and_input((2, 13, M))
    incoming = torch.randn(2, 13, M, dtype=torch.float64)
    checkpoint(tiled_mlp, apply, mlp, x, 4, None, use_reentrant=reentrant).backward(incoming)
    got = [x.grad, *(param.grad for param in mlp.parameters())]
    torch.testing.assert_close(tuple(got), gradients(mlp(x), incoming, x, *mlp.parameters()))


def test_a_weight_gets_its_gradient_once_a_pass():
    """ZeRO counts on it: it reduces a gradient when it first arrives."""
    mlp, x = mlp_and_input((2, 13, M))
    arrived = []
    mlp[0].weight.register_post_accumulate_grad_hook(arrived.append)
    tiled_mlp(apply, mlp, x, 4, None).sum().backward()
    assert len(arrived) == 1


def test_without_autograd_nothing_is_kept():
    mlp, x = mlp_and_input((2, 13, M))
    with torch.inference_mode():
        tiled = tiled_mlp(apply, mlp, x, 4, None)
    assert not tiled.requires_grad
    torch.testing.assert_close(tiled.clone(), mlp(x).detach())


def test_no_logits_are_kept_for_the_backward():
    head, x, y, _ = head_and_rows()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        tiled_logits_loss(token_losses, head, x, y, None, 5, [head.weight], "sum")
        assert not any(shape[-1:] == (V,) for shape in saved)
        token_losses(head, x.flatten(0, 1), y.flatten())
        assert any(shape[-1:] == (V,) for shape in saved)


def head_and_rows(B=2, S=7):
    torch.manual_seed(1)
    head = torch.nn.Linear(M, V).double()
    x = torch.randn(B, S, M, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, V, (B, S))
    mask = torch.rand(B, S, dtype=torch.float64)
    return head, x, y, mask


def token_losses(head, x, y, *mask):
    losses = F.cross_entropy(head(x), y, reduction="none")
    return (losses * mask[0]).sum() if mask else losses.sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_tiles", [1, 3, 5, 40])
def test_the_sum_over_tiles_is_the_loss(num_tiles, masked):
    head, x, y, mask = head_and_rows()
    mask = mask if masked else None
    whole = token_losses(head, x.flatten(0, 1), y.flatten(), *([] if mask is None else [mask.flatten()]))
    tiled = tiled_logits_loss(token_losses, head, x, y, mask, num_tiles, [head.weight], "sum")
    torch.testing.assert_close(tiled, whole)
    # The factor of gradient accumulation comes from behind.
    incoming = torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(
        gradients(tiled, incoming, x, *head.parameters()), gradients(whole, incoming, x, *head.parameters())
    )


def test_the_mean_divides_by_the_tiles_that_were_made():
    head, x, y, _ = head_and_rows(2, 8)  # 16 rows for 5 tiles: 4 of 4
    rows = F.cross_entropy(head(x.flatten(0, 1)), y.flatten(), reduction="mean")

    def mean(head, x, y):
        return F.cross_entropy(head(x), y)

    tiled = tiled_logits_loss(mean, head, x, y, None, 5, [head.weight], "mean")
    torch.testing.assert_close(tiled, rows)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(gradients(tiled, one, head.weight), gradients(rows, one, head.weight))


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"output_reduction": "max"}, r"output_reduction be 'mean' or 'sum' \(got .* and 'max'\)"),
        ({"x": torch.zeros(2, 6, M)}, r"same \[batch, sequence\], .* \(got \[\[2, 6\], \[2, 7\]\]"),
        ({"mask": torch.ones(2, 6)}, r"same \[batch, sequence\], .* \(got \[\[2, 7\], \[2, 7\], \[2, 6\]\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed, sentence):
    head, x, y, _ = head_and_rows()
    call = {"x": x, "y": y, "mask": None, "shards": 3, "compute_params": None, "output_reduction": "sum"}
    with pytest.raises(ShapeError, match=sentence):
        tiled_logits_loss(token_losses, head, **{**call, **changed})
