"""Whole batches at the engine: what a program does with them beside the model's loss is what it does at SP 1."""

import tempfile

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, full_weight, model_config
from benchmarks.ranks import RankError
from benchmarks.trainer import trainer_config
from deepspeed_alst.errors import SetupError
from tests.integrations.test_trainer import make_trainer

GENERATED = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def equal_documents(count: int, length: int = 23, seed: int = 5) -> list[dict]:
    make = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        ids = torch.randint(1, 97, (length,), generator=make)
        labels = ids.clone()
        labels[: 2 + 5 * (index % 3)] = -100  # so that the shards' counts differ
        samples.append({"input_ids": ids, "labels": labels})
    return samples


# --- the HF Trainer


def trainer_with(kind: str, sp_size: int, folder: str, **options):
    from transformers import Seq2SeqTrainer, Trainer

    class Generating(Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
            return loss, self.model.generate(inputs["input_ids"], **GENERATED)[:, -4:], inputs["labels"]

    class Rescaling(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            count = (inputs["labels"][:, 1:] != -100).sum()
            loss = outputs.loss * count / (20 if num_items_in_batch is None else num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    class Keeping(Trainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            if self.model.training:
                shown = (inputs["labels"] != -100)[0]
                inputs["labels"] = torch.nn.functional.pad(inputs["labels"][:, shown], (1, 0), value=-100)
                inputs["logits_to_keep"] = torch.nn.functional.pad(shown[1:], (0, 1), value=True)
            return inputs

    class KeepingLast(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = {**inputs, "labels": inputs["labels"][:, -9:], "logits_to_keep": 9}
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Smoothing(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make_trainer(sp_size, folder, trainer_arguments={"train_dataset": equal_documents(12)}, **options)
    own = {each.__name__: each for each in (Generating, Rescaling, Keeping, KeepingLast, Smoothing)}
    trainer.__class__ = own.get(kind, Seq2SeqTrainer)
    if kind == "Seq2Seq":
        trainer.args.predict_with_generate, trainer.args.generation_config = True, None
        trainer.args.generation_max_length, trainer.args.generation_num_beams = 27, None
        trainer.model.generation_config.pad_token_id = 0
    return trainer


def run_kind(sp_size: int, kind: str, options: dict) -> dict:
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_with(kind, sp_size, folder, **options)
        trainer.eval_dataset = equal_documents(4, seed=6)
        trainer.compute_metrics = lambda p: seen.append(p.predictions.shape) or {"sum": float(p.predictions.sum())}
        trainer.train()
        evaluated = trainer.evaluate()
        engine = trainer.model_wrapped
        weights = {name: full_weight(param) for name, param in engine.module.named_parameters()}
        log = [line[key] for line in trainer.state.log_history if "loss" in line for key in ("loss", "grad_norm")]
        engine.destroy()
    return {"log": [*log, evaluated["eval_loss"], evaluated["eval_sum"]], "seen": seen, "weights": weights}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Generating", {}),
        ("Seq2Seq", {"stage": 3}),
        ("Rescaling", {}),
        ("Keeping", {}),
        ("KeepingLast", {}),
        ("Smoothing", {"label_smoothing_factor": 0.2}),
    ],
)
def test_a_trainer_whose_methods_are_the_programs_is_that_of_sp1(kind, options, ranks2):
    whole, split = (ranks2.run(run_kind, sp_size, kind, options)[0] for sp_size in (1, 2))
    assert split["seen"] == whole["seen"]
    # Logits of a tiled loss are summed in another order.
    assert split["log"] == pytest.approx(whole["log"], rel=2e-4)
    for name, weight in whole["weights"].items():
        assert (split["weights"][name] - weight).norm() < 1e-5 * weight.norm(), name


# --- the loss that engine.backward is given


def scaled_by_a_shards_labels() -> None:
    import deepspeed

    import deepspeed_alst

    config = trainer_config(Cell(stage=2), 2) | {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
    }
    model = build_model(model_config(Cell()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        own = [{key: x[None] for key, x in each.items()} for each in equal_documents(2, seed=dist.get_rank())]
        for batch in deepspeed_alst.shard_dataloader(own, engine):
            loss = engine(**batch).loss * (batch["labels"] != -100).sum() / 21
            engine.backward(loss)
            engine.step()
    finally:
        engine.destroy()


def test_a_loss_that_differs_over_the_ranks_of_a_sequence_is_refused_before_the_step(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(scaled_by_a_shards_labels)
    errors = caught.value.errors
    assert all(isinstance(error, SetupError) and "rank's shard alone" in str(error) for error in errors), errors


# --- accelerate


def accelerated(sp_size: int) -> dict:
    """accelerate's own kind of loop: prepared loaders, accumulation, an evaluation with samples and metrics."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from tests.upstream_programs import accelerates_state_forgotten

    unset_hf_deepspeed_config()
    with accelerates_state_forgotten():
        pass  # the Trainers' of other tests
    with accelerates_state_forgotten():
        config = trainer_config(Cell(stage=2), sp_size) | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2 * sp_size,
            "gradient_clipping": 0.0,
        }
        # Without a GPU accelerate 1.15 takes every rank for the only one, unless it is given a backend.
        handlers = [InitProcessGroupKwargs(backend="gloo")]
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=handlers)
        model = build_model(model_config(Cell()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loader = torch.utils.data.DataLoader(equal_documents(8), batch_size=1)
        evaluated = torch.utils.data.DataLoader(equal_documents(5, seed=9), batch_size=1)
        model, optimizer, loader, evaluated = accelerator.prepare(model, optimizer, loader, evaluated)
        num_steps, losses, texts, correct = len(loader), [], [], []
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                texts.append(accelerator.unwrap_model(model).generate(batch["input_ids"], **GENERATED)[0].tolist())
                model.train()
        model.eval()
        for batch in evaluated:
            with torch.no_grad():
                outputs = model(**batch)
            losses.append(accelerator.gather(outputs.loss))
            right = (outputs.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).float()
            correct.append(accelerator.gather_for_metrics(right))
            texts.append(accelerator.unwrap_model(model).generate(batch["input_ids"], **GENERATED)[0].tolist())
        result = {
            "weights": {name: full_weight(param) for name, param in model.module.named_parameters()},
            "losses": torch.stack(losses).mean(0).tolist(),
            "correct": torch.cat(correct).mean().item(),
            "shape": tuple(torch.cat(correct).shape),
            "evaluated": (len(evaluated), texts[num_steps:]),
            "lengths": {len(text) for text in texts},
            "steps": num_steps,
        }
        model.destroy()
    return result


def test_loaders_that_accelerate_prepared_are_split_where_the_model_makes_the_loss(ranks2):
    whole, split = (ranks2.run(accelerated, sp_size) for sp_size in (1, 2))
    for ours, theirs in zip(split, whole, strict=True):
        assert ours["steps"] == 2 * theirs["steps"]
        assert (ours["evaluated"], ours["lengths"], ours["shape"]) == (
            theirs["evaluated"],
            {27},
            theirs["shape"],
        )
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-5)
        assert ours["correct"] == pytest.approx(theirs["correct"])
        for name, weight in theirs["weights"].items():
            assert (ours["weights"][name] - weight).norm() < 1e-5 * weight.norm(), name


# --- positions and documents of any kind

POSITIONS = {
    "zeros": torch.zeros(23, dtype=torch.long),
    "an offset": torch.arange(23) + 64,
    "a skip": torch.cat([torch.arange(9), torch.arange(14) + 40]),
    "scaled": 3 * torch.arange(23),
    "documents whose first labels count": torch.cat([torch.arange(9), torch.arange(14)]),
}


def on_positions(sp_size: int, positions: torch.Tensor, masked: bool) -> tuple[list[float], dict]:
    import deepspeed

    import deepspeed_alst

    config = trainer_config(Cell(stage=2), sp_size) | {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": sp_size,
        "gradient_clipping": 0.0,
    }
    model = build_model(model_config(Cell()))
    model.config.use_cache = False  # with a cache transformers at SP 1 lets documents see one another
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.randint(1, 97, (1, 23), generator=torch.Generator().manual_seed(dist.get_rank()))
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions[None]}
    if masked:
        batch["attention_mask"] = torch.ones_like(ids)
    losses = []
    for shard in deepspeed_alst.shard_dataloader([batch], engine):
        loss = engine(**shard).loss
        losses.append(float(loss))
        engine.backward(loss)
        engine.step()
    everyone = [None] * 2
    dist.all_gather_object(everyone, losses)
    weights = {name: full_weight(param) for name, param in engine.module.named_parameters()}
    engine.destroy()
    return everyone[0] if sp_size == 2 else [each[0] for each in everyone], weights


@pytest.mark.parametrize(
    ("name", "masked"), [*((name, False) for name in POSITIONS), ("a skip", True), ("scaled", True)]
)
def test_positions_of_any_kind_give_the_loss_and_the_weights_of_sp1(name, masked, ranks2):
    (theirs, whole), (ours, split) = (
        ranks2.run(on_positions, sp_size, POSITIONS[name], masked)[0] for sp_size in (1, 2)
    )
    assert ours == pytest.approx(theirs, rel=2e-5) and min(ours) > 1
    for key, weight in whole.items():
        assert (split[key] - weight).norm() < 1e-5 * weight.norm(), key
