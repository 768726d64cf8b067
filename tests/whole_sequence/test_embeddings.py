"""Embeddings that the program makes with a gradient, and modules around a model, train as at SP 1."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import deepspeed_alst
from benchmarks.cells import Cell, build_model, ds_config, full_weight, model_config
from benchmarks.ranks import RankError
from deepspeed_alst.errors import DataError
from tests.whole_sequence.test_log_probs import GAS, RATE, STEPS, WORLD, batch_of

HIDDEN, PROMPT = model_config(Cell()).hidden_size, 5


def labels_of(batch: dict) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[batch["attention_mask"].cumsum(1) == 1] = -100
    return labels


def soft_prompt(model, batch):
    """Virtual tokens before the sequence, or behind one that is padded on the left."""
    inner, ids = getattr(model, "module", model), batch["input_ids"]
    parts = [
        (inner.prompt(torch.arange(PROMPT)).expand(len(ids), -1, -1), ids.new_ones((len(ids), PROMPT))),
        (inner.get_input_embeddings()(ids), batch["attention_mask"]),
    ]
    labels = [torch.full_like(parts[0][1], -100), labels_of(batch)]
    order = 1 if batch["attention_mask"][:, 0].all() else -1
    embeds, mask = (torch.cat(each[::order], 1) for each in zip(*parts, strict=True))
    return model(inputs_embeds=embeds, attention_mask=mask, labels=torch.cat(labels[::order], 1)).loss


def projector(model, batch):
    """Features of another modality in the place of some tokens, and a loss made of logits and embeddings."""
    inner, ids, mask = getattr(model, "module", model), batch["input_ids"], batch["attention_mask"]
    features = torch.randn((len(ids), 3, 7), generator=torch.Generator().manual_seed(int(ids.sum())))
    at = 2 if mask[:, 0].all() else ids.shape[1] - 5
    tokens = inner.get_input_embeddings()(ids)
    embeds = torch.cat([tokens[:, :at], inner.projector(features), tokens[:, at + 3 :]], 1)
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits[:, :-1].float()
    loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels_of(batch)[:, 1:].reshape(-1))
    return loss + 0.01 * (embeds * mask[..., None]).square().mean()


def adapter(model, batch):
    """PEFT's virtual tokens, which PEFT puts before the sequence."""
    return model(**batch, labels=labels_of(batch)).loss


def values(model, batch):
    """Log-probabilities and a value of each token."""
    logits, value = model(batch["input_ids"], batch["attention_mask"])
    mask, ids = batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1], batch["input_ids"][:, 1:]
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return ((0.3 * (value[:, :-1] - 1).square() - log_probs) * mask).sum() / mask.sum()


class WithValues(torch.nn.Module):
    """A language model with a value of each token, as PPO's critics have."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = torch.nn.Linear(HIDDEN, 1)

    def forward(self, input_ids, attention_mask):
        outputs = self.pretrained_model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return outputs.logits.float(), self.v_head(outputs.hidden_states[-1]).squeeze(-1)


PROGRAMS = {
    "soft prompt": soft_prompt,
    "soft prompt, frozen model": soft_prompt,
    "projector": projector,
    "prompt tuning": adapter,
    "p-tuning": adapter,
    "values": values,
    "values, LoRA": values,
}


def build(name: str) -> torch.nn.Module:
    model = build_model(model_config(Cell()))
    if name in ("prompt tuning", "p-tuning", "values, LoRA"):
        import peft

        configs = {
            "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT),
            "p-tuning": lambda: peft.PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, encoder_hidden_size=9
            ),
            "values, LoRA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
        }
        model = peft.get_peft_model(model, configs[name]())
    if "frozen" in name:
        model.requires_grad_(False)
    if "soft prompt" in name:
        model.prompt = torch.nn.Embedding(PROMPT, HIDDEN)
    if "projector" in name:
        model.projector = torch.nn.Linear(7, HIDDEN)
    return WithValues(model) if "values" in name else model


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def train(name: str, stage: int, left: bool, tiles: bool) -> dict:
    model = build(name)
    config = ds_config(Cell(stage=stage, gas=GAS, tiles=tiles), 2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(trained(model).values(), RATE), config=config
    )
    own = [batch_of(step, micro, dist.get_rank(), left) for step in range(STEPS) for micro in range(GAS)]
    losses = []
    for batch in deepspeed_alst.shard_dataloader(own, engine, whole=True):
        loss = PROGRAMS[name](engine, batch)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    weights = {key: full_weight(param) for key, param in trained(engine.module).items()}
    engine.eval()
    with torch.no_grad():
        evaluated = float(PROGRAMS[name](engine, own[0]))
    engine.destroy()
    return {"losses": losses, "weights": weights, "evaluated": evaluated}


SLOW = (
    *((name, stage) for name in ("soft prompt", "values") for stage in (0, 3)),
    *(("projector", 2), ("prompt tuning", 3), ("values", 2)),
)
CASES = [
    ("soft prompt", 2),
    ("soft prompt, frozen model", 3),
    ("projector", 3),
    ("prompt tuning", 0),
    ("p-tuning", 2),
    ("values, LoRA", 3),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW),
]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_the_loss_and_the_weights_are_those_of_plain_torch(name, stage, ranks2):
    left = stage > 0 and "tuning" not in name  # PEFT puts its tokens before the padding
    found = ranks2.run(train, name, stage, left, stage != 2)
    model, loss_of = build(name), PROGRAMS[name]
    before = {key: param.detach().clone() for key, param in trained(model).items()}
    optimizer, losses = torch.optim.SGD(trained(model).values(), RATE), []
    for step in range(STEPS):
        for micro in range(GAS):
            for rank in range(WORLD):
                loss = loss_of(model, batch_of(step, micro, rank, left))
                losses.append(float(loss))
                (loss / (GAS * WORLD)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(losses, rel=1e-5, abs=1e-6)
    for key, param in trained(model).items():
        change = param - before[key]
        assert (found[0]["weights"][key] - param).norm() <= 1e-5 * param.norm(), key
        assert (found[0]["weights"][key] - before[key] - change).norm() <= 1e-3 * change.norm(), key
    model.eval()
    for rank in range(WORLD):  # each rank its own batch
        assert found[rank]["evaluated"] == pytest.approx(
            float(loss_of(model, batch_of(0, 0, rank, left))), rel=1e-5, abs=1e-6
        )


def refuse(kind: str) -> None:
    model = build("soft prompt")
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(stage=2), 2))
    loader = deepspeed_alst.shard_dataloader([batch_of(0, 0, dist.get_rank(), False)], engine, whole=True)
    batch = next(iter(loader))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    if kind == "noise":
        embeds = embeds + torch.randn(embeds.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
    if kind == "frozen on a rank" and dist.get_rank():
        embeds = embeds.detach()
    if kind == "large":
        embeds = embeds[:, :1].expand(-1, 2**29 // HIDDEN, -1)
        batch = {}
    try:
        engine(**batch | {"input_ids": None, "inputs_embeds": embeds})
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("noise", "are not the same on all of them"),
        ("frozen on a rank", "are not the same on all of them"),
        ("large", "inputs_embeds of shape"),
    ],
)
def test_embeddings_that_differ_or_are_too_large_are_refused(kind, words, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(refuse, kind)
    assert all(isinstance(each, DataError) and words in str(each) for each in caught.value.errors), caught.value
