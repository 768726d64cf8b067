"""A loss that a program makes of its logits or hidden states is that of SP 1, in a loop and in the HF Trainer."""

from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import deepspeed_alst
from benchmarks.cells import Cell, build_model, ds_config, full_weight, model_config
from benchmarks.ranks import RankError
from deepspeed_alst.distributed import gather
from deepspeed_alst.errors import DataError, SetupError
from tests.whole_sequence.test_log_probs import GAS, RATE, STEPS, WORLD, batch_of, by_turns


def of_labels(model, batch, teacher):
    """TRL's way without a fused head, with an entropy."""
    logits = model(**batch).logits[:, :-1] / 0.7
    ids, mask = batch["input_ids"][:, 1:], batch["attention_mask"]
    both = mask[:, 1:] * mask[:, :-1]
    chosen = torch.gather(logits, -1, ids[..., None]).squeeze(-1)
    log_p = chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    spread = F.log_softmax(logits, dim=-1)
    entropy = -(spread.exp() * spread).sum(-1)
    return (-(log_p - 0.1 * entropy) * both).sum() / both.sum()


def cross_entropy(model, batch, teacher):
    """A shifted loss as scripts write it, beside the model's own."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[batch["attention_mask"].cumsum(1) == 1] = -100
    outputs = model(**batch, labels=labels)
    logits = outputs.logits[..., :-1, :].float().reshape(-1, outputs.logits.size(-1))
    return outputs.loss + F.cross_entropy(logits, labels[:, 1:].reshape(-1), label_smoothing=0.1)


def distillation(model, batch, teacher):
    """The divergence from a second model in the process, which knows nothing of ranks."""
    with torch.no_grad():
        wanted = teacher(**batch).logits
    logits = model(**batch).logits
    apart = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(wanted, -1), reduction="none", log_target=True).sum(-1)
    return (apart * batch["attention_mask"]).sum() / batch["attention_mask"].sum()


def hidden_states(model, batch, teacher):
    """Mean pooling of a middle and the last hidden state, and a contrast between rows."""
    outputs = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"][..., None]
    pooled = sum((h * mask).sum(1) / mask.sum(1) for h in outputs.hidden_states[-2:])
    one, two = F.normalize(pooled, dim=-1)
    size = outputs.hidden_states[-1].float().pow(2).mean(-1, keepdim=True)
    return 1 - (one * two).sum() + (size * mask).sum() / mask.sum()


def self_weighted(model, batch, teacher):
    """The tokens' own probabilities as weights, without a gradient."""
    logits = model(**batch).logits
    with torch.no_grad():
        weights = logits.softmax(-1)
    each = -(weights * logits.log_softmax(-1)).sum(-1) * logits.detach().logsumexp(-1).sigmoid()
    return (each * batch["attention_mask"]).sum() / batch["attention_mask"].sum()


def compared(model, batch, teacher):
    """Ranks of the chosen logits and of the largest, which have no gradient, as weights."""
    logits = model(**batch).logits
    chosen = logits.gather(-1, batch["input_ids"][..., None])
    weights = (logits > chosen).sum(-1) / logits.size(-1) + logits.argsort(-1)[..., 0] / logits.size(-1)
    return (weights * logits.logsumexp(-1) * batch["attention_mask"]).sum() / batch["attention_mask"].sum()


def standardized(model, batch, teacher):
    """Hidden states centred over the batch, by a statistic with a gradient."""
    outputs = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"][..., None].float()
    state = outputs.hidden_states[-1]
    mean = (state * mask).sum((0, 1)) / mask.sum()
    return ((state - mean).pow(3).tanh() * mask).sum() / mask.sum()


PROGRAMS = {each.__name__: each for each in (of_labels, cross_entropy, distillation, hidden_states)}
PROGRAMS |= {each.__name__: each for each in (self_weighted, compared, standardized)}


def teacher_of() -> torch.nn.Module:
    torch.manual_seed(77)
    return type(build_model(model_config(Cell())))(model_config(Cell())).eval()


def train(program: str, sp_size: int, stage: int, left: bool, tiles: bool) -> dict:
    model, teacher = build_model(model_config(Cell())), teacher_of()
    config = ds_config(Cell(stage=stage, gas=GAS, tiles=tiles), sp_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), RATE), config=config)
    own = [batch_of(step, micro, dist.get_rank(), left) for step in range(STEPS) for micro in range(GAS)]
    losses = []
    for batch in deepspeed_alst.shard_dataloader(own, engine, whole=True):
        loss = PROGRAMS[program](engine, batch, teacher)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    weights = {name: full_weight(param) for name, param in engine.module.named_parameters()}
    engine.destroy()
    return {"losses": losses, "weights": weights}


def reference(program, model: torch.nn.Module, teacher: torch.nn.Module, left: bool) -> tuple[list[float], dict]:
    """Plain torch's losses, and its weights after the same steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), RATE), []
    for step in range(STEPS):
        for micro in range(GAS):
            for rank in range(WORLD):
                loss = program(model, batch_of(step, micro, rank, left), teacher)
                losses.append(float(loss))
                (loss / (GAS * WORLD)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize(("program", "stage", "left", "tiles"), by_turns(PROGRAMS))
def test_a_loop_trains_as_at_sp1(program, stage, left, tiles, ranks2):
    found = ranks2.run(train, program, 2, stage, left, tiles)
    losses, weights = reference(PROGRAMS[program], build_model(model_config(Cell())), teacher_of(), left)
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(losses, rel=1e-5)
    for name, param in weights.items():
        assert (found[0]["weights"][name] - param).norm() < 1e-5 * param.norm(), name


def distill(sp_size: int, stage: int, large: bool) -> dict:
    """The teacher in an engine of its own; with ``large`` its logits exceed what a rank may hold whole."""
    student, teacher = build_model(model_config(Cell())), teacher_of()
    config = ds_config(Cell(stage=stage, gas=GAS, tiles=True), sp_size)
    engine, *_ = deepspeed.initialize(
        model=student, optimizer=torch.optim.SGD(student.parameters(), RATE), config=config
    )
    # DeepSpeed has ZeRO 1 and 2 with an optimizer alone.
    without = ds_config(Cell(stage=stage if stage == 3 else 0, gas=GAS, tiles=True), sp_size)
    frozen, *_ = deepspeed.initialize(model=teacher, config=without)
    frozen.eval()
    own = [batch_of(step, micro, dist.get_rank(), True) for step in range(STEPS) for micro in range(GAS)]
    losses = []
    with mock.patch.object(gather, "MAX_BYTES", 0 if large else 2**31):
        for batch in deepspeed_alst.shard_dataloader(own, engine, whole=True):
            loss = distillation(engine, batch, frozen)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    weights = {name: full_weight(param) for name, param in engine.module.named_parameters()}
    engine.destroy()
    frozen.destroy()
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize(("stage", "large"), [(2, False), (0, True), (3, True)])
def test_a_teacher_in_an_engine_of_its_own_is_split_too(stage, large, ranks2):
    found = ranks2.run(distill, 2, stage, large)
    model, teacher = build_model(model_config(Cell())), teacher_of()
    losses, weights = reference(distillation, model, teacher, True)
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(losses, rel=1e-5)
    for name, param in weights.items():
        assert (found[0]["weights"][name] - param).norm() < 1e-5 * param.norm(), name


def call_loss_backward() -> None:
    model = build_model(model_config(Cell()))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(stage=2, tiles=True), 2))
    loader = deepspeed_alst.shard_dataloader([batch_of(0, 0, 0, False)], engine, whole=True)
    try:
        engine(**next(iter(loader))).logits.logsumexp(-1).sum().backward()
    finally:
        engine.destroy()


def test_a_direct_backward_is_refused(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(call_loss_backward)
    assert all(isinstance(each, SetupError) for each in caught.value.errors)


def evaluate_with_other_outputs(same: bool) -> str:
    engine, *_ = deepspeed.initialize(model=build_model(model_config(Cell())), config=ds_config(Cell(stage=0), 2))
    engine.eval()
    batch = batch_of(0, 0, 0 if same else dist.get_rank(), False)
    with torch.no_grad(), pytest.raises(DataError) as caught:
        engine(**batch, output_hidden_states=dist.get_rank() == 0)
    engine.destroy()
    return str(caught.value)


@pytest.mark.parametrize("same", [True, False])
def test_an_evaluation_whose_ranks_ask_for_other_outputs_is_refused_on_all(same, ranks2):
    for said in ranks2.run(evaluate_with_other_outputs, same, seconds=120):
        assert "the ranks of a sequence asked for different outputs: [['logits', 'hidden_states'], ['logits']]" in said
