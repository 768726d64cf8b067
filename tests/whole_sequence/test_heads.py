"""Classifiers, reward models and bare decoders train under sequence parallelism as without it."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import deepspeed_alst
from benchmarks.cells import Cell, ds_config, full_weight, model_config
from benchmarks.ranks import RankError
from deepspeed_alst.errors import UnsupportedModelError
from tests.whole_sequence.test_log_probs import GAS, RATE, STEPS, WORLD, batch_of, by_turns


def config_of(labels: int):
    config = model_config(Cell())
    config.num_labels, config.pad_token_id, config.classifier_dropout = labels, 0, 0.0
    return config


def classes(model, batch):
    """Two rows, of one of three classes each, by the model's own loss."""
    return model(**batch, labels=batch["input_ids"][:, 3] % 3).loss


def reward(model, batch):
    """Bradley and Terry's, of a chosen and a rejected row."""
    chosen, rejected = model(**batch).logits.squeeze(-1)
    return -F.logsigmoid(chosen - rejected)


def regression(model, batch):
    return model(**batch, labels=batch["input_ids"][:, 3].float() / 50).loss


def token_classes(model, batch):
    labels = (batch["input_ids"] % 4).masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    return output.loss + 0.1 * (output.logits.logsumexp(-1) * batch["attention_mask"]).mean()


def embedding(model, batch):
    """A bare decoder: mean pooling, and a contrast between the rows."""
    mask = batch["attention_mask"][..., None]
    one, two = F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
    return 1 - (one * two).sum()


HEADS = {
    "classes": (LlamaForSequenceClassification, 3, classes),
    "reward": (LlamaForSequenceClassification, 1, reward),
    "another family": (GPT2ForSequenceClassification, 1, reward),
    "regression": (LlamaForSequenceClassification, 1, regression),
    "token classes": (LlamaForTokenClassification, 4, token_classes),
    "embedding": (LlamaModel, 2, embedding),
}


def build(name: str) -> torch.nn.Module:
    cls, labels, _ = HEADS[name]
    torch.manual_seed(5)
    if cls is GPT2ForSequenceClassification:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "pad_token_id": 0, "num_labels": labels}
        return cls(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return cls(config_of(labels))


def train(name: str, stage: int, left: bool, tiles: bool) -> dict:
    model = build(name)
    config = ds_config(Cell(stage=stage, gas=GAS, tiles=tiles), 2)
    config["alst"].pop("tiled_logits_loss", None)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), RATE), config=config)
    own = [batch_of(step, micro, dist.get_rank(), left) for step in range(STEPS) for micro in range(GAS)]
    losses = []
    for batch in deepspeed_alst.shard_dataloader(own, engine):
        loss = HEADS[name][2](engine, batch)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    weights = {key: full_weight(param) for key, param in engine.module.named_parameters()}
    engine.eval()
    with torch.no_grad():
        evaluated = float(HEADS[name][2](engine, own[0]))
    engine.destroy()
    return {"losses": losses, "weights": weights, "evaluated": evaluated}


@pytest.mark.parametrize(("name", "stage", "left", "tiles"), by_turns(HEADS))
def test_a_head_trains_as_at_sp1(name, stage, left, tiles, ranks2):
    found = ranks2.run(train, name, stage, left, tiles)
    model, (_, _, loss_of) = build(name), HEADS[name]
    optimizer, losses = torch.optim.SGD(model.parameters(), RATE), []
    for step in range(STEPS):
        for micro in range(GAS):
            for rank in range(WORLD):
                loss = loss_of(model, batch_of(step, micro, rank, left))
                losses.append(float(loss))
                (loss / (GAS * WORLD)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(losses, rel=1e-5, abs=1e-6)
    for key, param in model.named_parameters():
        assert (found[0]["weights"][key] - param).norm() <= 1e-5 * param.norm(), key
    model.eval()
    for rank in range(WORLD):  # each rank its own batch
        assert found[rank]["evaluated"] == pytest.approx(
            float(loss_of(model, batch_of(0, 0, rank, left))), rel=1e-5, abs=1e-6
        )


class Recurrent(LlamaForSequenceClassification):
    """A head that mixes tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.GRU(config.hidden_size, 1, batch_first=True)


def refuse(kind: str) -> None:
    if kind == "encoder":
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
        model = BertForSequenceClassification(BertConfig(vocab_size=97, **sizes))
    else:
        model = Recurrent(config_of(1))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(stage=2), 2))


@pytest.mark.parametrize(
    ("kind", "words"), [("encoder", "sequence and token classifiers"), ("mixing", "score is a GRU")]
)
def test_an_encoder_and_a_head_that_mixes_tokens_are_refused(kind, words, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(refuse, kind)
    assert all(isinstance(each, UnsupportedModelError) and words in str(each) for each in caught.value.errors)


def dropped(stage: int) -> float:
    """A classifier whose dropout is on: its loss changes, and is the same on both ranks."""
    config = config_of(4)
    config.classifier_dropout = 0.5
    torch.manual_seed(5)
    model = LlamaForTokenClassification(config)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(stage=stage), 2))
    losses = [float(token_classes(engine, batch_of(0, 0, 0, False))) for _ in range(2)]
    engine.destroy()
    return losses


def test_a_heads_dropout_is_on_and_the_loss_the_same_on_both_ranks(ranks2):
    one, two = ranks2.run(dropped, 2)
    assert one == two and one[0] != one[1]
