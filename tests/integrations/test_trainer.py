"""The HF Trainer by keys only: what it counts, trains, evaluates and generates is what it is at SP 1."""

import logging
import tempfile

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, full_weight, model_config
from benchmarks.families import family_config
from benchmarks.ranks import RankError
from benchmarks.trainer import run_trainer, run_trainer_truth, trainer_cells, trainer_config
from deepspeed_alst.errors import ConfigError, DataError, ShapeError

VOCAB = 97


def documents(count: int, seed: int = 3, longest: int = 60) -> list[dict]:
    """Documents of unequal length, each with a prompt that has no label."""
    make = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        length = 9 + (index * 17) % (longest - 9)
        ids = torch.randint(0, VOCAB, (length,), generator=make)
        labels = ids.clone()
        labels[: index % 4] = -100
        samples.append({"input_ids": ids, "labels": labels, "length": length})
    return samples


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=0),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True, padding_value=0),
    }


class Stream(torch.utils.data.IterableDataset):
    """An iterable without a length, the same on every rank; accelerate shares it out."""

    def __init__(self, as_long: int | None = None) -> None:
        self.as_long = as_long

    def __iter__(self):
        for sample in documents(64):
            if self.as_long is None:
                yield sample
            else:
                yield {key: x[: self.as_long] for key, x in sample.items() if key != "length"}


def make_trainer(sp_size: int, folder: str, stage: int = 2, trainer_arguments=None, model=None, config=None, **options):
    """A Trainer with plain SGD, of a model or of its config; ``options`` are TrainingArguments'."""
    from transformers import PreTrainedConfig, Trainer, TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if model is None or isinstance(model, PreTrainedConfig):
        model = build_model(model or model_config(Cell()))
    defaults = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        deepspeed=trainer_config(Cell(stage=stage), sp_size) | (config or {}),
        **defaults | options,
    )
    arguments = {"train_dataset": documents(40), "data_collator": collate} | (trainer_arguments or {})
    return Trainer(model=model, args=args, **arguments)


def facts(trainer) -> dict:
    """What a user sees of a run: the log, the counts and the weights."""
    engine = trainer.model_wrapped
    weights = {name: full_weight(param) for name, param in engine.module.named_parameters()}
    keys = ("loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen", "eval_loss")
    state = trainer.state
    return {
        "log": [{key: line[key] for key in keys if key in line} for line in state.log_history],
        "counts": (state.max_steps, state.global_step, state.num_train_epochs, state.epoch),
        "batch": trainer.get_total_train_batch_size(trainer.args),
        "accumulation": trainer.args.gradient_accumulation_steps,
        "engine": (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()),
        "flos": state.total_flos,
        "weights": weights if dist.get_rank() == 0 else {},
    }


def train(sp_size: int, options: dict, arguments: dict | None = None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(sp_size, folder, trainer_arguments=arguments, **options)
        trainer.train()
        result = facts(trainer)
        store = getattr(trainer.model_wrapped, "alst_offload", None)
        result["moved"] = store.counts.bytes_out if store is not None else 0
        trainer.model_wrapped.destroy()
    return result


def assert_same(ours: dict, theirs: dict) -> None:
    for key in ("counts", "batch", "accumulation", "engine", "flos"):
        assert ours[key] == theirs[key], key
    assert len(ours["log"]) == len(theirs["log"])
    for our_line, their_line in zip(ours["log"], theirs["log"], strict=True):
        assert our_line == pytest.approx(their_line, rel=2e-5)
    for name, weight in theirs["weights"].items():
        # Against the change of three steps, which is a few per cent of the weight.
        assert (ours["weights"][name] - weight).norm() < 1e-5 * weight.norm(), name


OPTIONS = {
    "plain": {},
    "epochs": {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 3},
    "batches of two": {"per_device_train_batch_size": 2, "max_grad_norm": 0.5},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "label smoothing under ZeRO 3": {"label_smoothing_factor": 0.2, "stage": 3},
    "tokens averaged on each rank": {"average_tokens_across_devices": False},
    "grouped by length": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2},
    "tokens counted": {"include_num_input_tokens_seen": "all", "gradient_accumulation_steps": 1},
    "checkpointing": {"gradient_checkpointing": True, "stage": 3},
    "a mixture with its router's loss": {
        "model": family_config("olmoe", output_router_logits=True, router_aux_loss_coef=1.0),
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "stage": 3,
    },
    '"auto" in the alst block': {
        "config": {"alst": {"pad_to_multiple_of": "auto", "reduction": {"bucket_size": "auto"}}},
    },
    "offload": {
        "stage": 3,
        "config": {"alst": {"pad_to_multiple_of": 2, "activation_checkpoint_cpu_offload": {"host_budget": "auto"}}},
    },
}


# Checkpointing and batches of two are the mixture's too, and the smoothing is under ZeRO 3.
SLOW = ("checkpointing", "label smoothing", "batches of two")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OPTIONS])
def test_a_trainer_at_sp2_is_the_trainer_at_sp1(name, ranks2):
    whole, split = (ranks2.run(train, sp_size, OPTIONS[name])[0] for sp_size in (1, 2))
    assert_same(split, whole)
    assert (split["moved"] > 0) == (name == "offload")
    assert len({line["loss"] for line in split["log"] if "loss" in line}) > 1


@pytest.mark.parametrize(
    ("stream", "dispatch"), [(Stream(), False), (Stream(as_long=9), True)], ids=["read by each rank", "read by rank 0"]
)
def test_an_iterable_dataset(stream, dispatch, ranks2):
    options = {"accelerator_config": {"dispatch_batches": dispatch}}
    whole, split = (ranks2.run(train, sp_size, options, {"train_dataset": stream})[0] for sp_size in (1, 2))
    assert_same(split, whole)


class OwnStream(torch.utils.data.IterableDataset):
    """An iterable that has fewer samples on rank 1."""

    def __iter__(self):
        yield from documents(16 if dist.get_rank() == 0 else 8)


def refusal_of(what: str, options: dict, data: dict) -> str:
    trainer = make_trainer(2, tempfile.mkdtemp(), trainer_arguments={"data_collator": collate, **data}, **options)
    with pytest.raises(DataError) as raised:
        getattr(trainer, what)()
    trainer.model_wrapped.destroy()
    return str(raised.value)


@pytest.mark.parametrize("gas", [1, 3])
def test_streams_of_other_lengths_on_other_ranks_are_refused_on_all(gas, ranks2):
    options = {"accelerator_config": {"dispatch_batches": False}, "max_steps": 20, "gradient_accumulation_steps": gas}
    for said in ranks2.run(refusal_of, "train", options, {"train_dataset": OwnStream()}, seconds=120):
        assert "the ranks have different numbers of batches (rank 0: in training of 20 steps" in said


@pytest.mark.parametrize("key", ["train_dataset", "eval_dataset"])
def test_a_token_without_an_embedding_is_refused_on_all_ranks(key, ranks2):
    samples = documents(8)
    for sample in samples[1::2]:  # rank 1's
        sample["input_ids"][2], sample["labels"][2] = VOCAB, -100
    options = {"train_sampling_strategy": "sequential", "eval_strategy": "steps", "eval_steps": 1}
    mine, its = ranks2.run(refusal_of, "train", options, {"eval_dataset": documents(8), key: samples}, seconds=120)
    assert its.startswith(f"input_ids of row 0 has {VOCAB} at token 2, and the model has embeddings for 0 to")
    assert mine == f"rank 1: {its}"


def changed_after_the_loader() -> str:
    import deepspeed

    import deepspeed_alst

    model = build_model(model_config(Cell()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(), 2))[0]
    ids = torch.arange(24)[None]
    (batch, _) = deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine)
    batch["input_ids"][0, 3] = -1 if dist.get_rank() == 1 else 1
    with pytest.raises(DataError) as raised:
        engine(**batch)
    engine.destroy()
    return str(raised.value)


def test_a_token_without_an_embedding_that_a_program_makes_of_a_shard_is_refused_on_all_ranks(ranks2):
    for said in ranks2.run(changed_after_the_loader, seconds=120):
        assert "invalid batch on rank 1: input_ids of row 0 has -1 at token 3" in said


def deepspeeds_loader_of(dataset) -> str:
    import deepspeed

    model = build_model(model_config(Cell()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(DataError) as raised:
        deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(), 2), training_data=dataset)
    return str(raised.value)


def test_an_iterable_dataset_as_training_data_is_refused_with_the_line_for_a_loader(ranks2):
    for said in ranks2.run(deepspeeds_loader_of, Stream(), seconds=120):
        assert "training_data is a Stream, an IterableDataset" in said and "shard_dataloader(torch.utils" in said


def test_an_evaluation_of_streams_of_other_lengths_is_refused_on_all(ranks2):
    options = {"accelerator_config": {"dispatch_batches": False}, "eval_strategy": "steps", "eval_steps": 1}
    data = {"train_dataset": Stream(), "eval_dataset": OwnStream()}
    for said in ranks2.run(refusal_of, "train", options, data, seconds=120):
        assert "(rank 0: within an evaluation; rank 1: at the end of an evaluation)" in said


@pytest.mark.slow
@pytest.mark.parametrize("sp_size", [2, 4])
def test_four_ranks(sp_size, ranks4):
    whole, split = (ranks4.run(train, size, {"stage": 3}) for size in (1, sp_size))
    assert_same(split[0], whole[0])


@pytest.mark.parametrize("cell", [trainer_cells()[0], trainer_cells()[3]], ids=lambda cell: cell.name())
def test_it_is_as_exact_as_the_trainer_at_sp1(cell, ranks2):
    from benchmarks.parity import errors, missed

    truth = run_trainer_truth(cell)
    whole, split = (errors(ranks2.run(run_trainer, cell, sp_size)[0], truth) for sp_size in (1, cell.sp_size))
    assert not missed(split, whole)


def micro_steps(given, gas: int) -> tuple:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            2, folder, config={"gradient_accumulation_steps": given}, gradient_accumulation_steps=gas
        )
        plugin = trainer.accelerator.state.deepspeed_plugin
        unset_hf_deepspeed_config()
        return (
            plugin.deepspeed_config["gradient_accumulation_steps"],
            plugin.deepspeed_config["train_batch_size"],
            trainer.get_total_train_batch_size(trainer.args),
        )


@pytest.mark.parametrize(
    ("given", "gas", "expected"), [("auto", 3, (6, 6, 6)), (6, 6, (6, 6, 6)), (2, 2, (2, 2, 2)), (6, 3, (6, 6, 6))]
)
def test_auto_keeps_the_total_batch_and_a_number_counts_micro_steps(given, gas, expected, ranks2):
    assert ranks2.run(micro_steps, given, gas)[0] == expected


def complaints_of_accelerate() -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("accelerate.accelerator").addHandler(handler)
    try:
        train(2, {"gradient_accumulation_steps": 1, "max_steps": 1})
    finally:
        logging.getLogger("accelerate.accelerator").removeHandler(handler)
    return [record.getMessage() for record in records]


def test_accelerate_does_not_complain_of_the_micro_steps(ranks2):
    assert not any("accumulation" in line for lines in ranks2.run(complaints_of_accelerate) for line in lines)


THREE_NUMBERS = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
REFUSED = {
    "train_batch_size=8": ({"gradient_accumulation_steps": 4}, {}, THREE_NUMBERS),
    "gradient_accumulation_steps=3": ({"gradient_accumulation_steps": 3}, {}, {"gradient_accumulation_steps": 3}),
    "neftune_noise_alpha=5": ({"neftune_noise_alpha": 5.0}, {}, {}),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, {}, {}),
    "even_batches=False": ({"accelerator_config": {"even_batches": False}}, {}, {}),
}


def train_refused(options: dict, arguments: dict, config: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(2, folder, trainer_arguments=arguments, config=config, **options)
        try:
            trainer.train()
        finally:
            trainer.model_wrapped.destroy()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_on_all_ranks(name, ranks2):
    options, arguments, config = REFUSED[name]
    with pytest.raises(RankError) as caught:
        ranks2.run(train_refused, options, arguments, config)
    assert all(isinstance(error, ConfigError) and name in str(error) for error in caught.value.errors)


def custom_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.2)
    return total / num_items_in_batch


def train_on_logits(sp_size: int, kind: str, tiles: bool) -> dict:
    """A loss made of the logits, by both of the Trainer's ways; the second adds it to the model's."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"compute_loss_func": custom_loss} if kind == "compute_loss_func" else {}
        options = {"eval_strategy": "steps", "eval_steps": 2} if kind == "compute_loss" else {}
        arguments |= {"eval_dataset": documents(4)} if options else {}
        config = {"alst": {"tiled_logits_loss": tiles}} if sp_size > 1 else {}
        trainer = make_trainer(sp_size, folder, trainer_arguments=arguments, config=config, **options)

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            log_p = outputs.logits.log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)[inputs["attention_mask"] > 0].mean()
            loss = outputs.loss - 0.1 * entropy
            return (loss, outputs) if return_outputs else loss

        if kind == "compute_loss":
            trainer.compute_loss = compute_loss
        trainer.train()
        result = facts(trainer)
        trainer.model_wrapped.destroy()
    return result


@pytest.mark.parametrize(
    ("kind", "tiles"),
    [
        ("compute_loss_func", True),
        ("compute_loss", True),
        pytest.param("compute_loss", False, marks=pytest.mark.slow),
    ],
)
def test_a_loss_made_of_logits_is_that_of_sp1(kind, tiles, ranks2):
    ours, theirs = ranks2.run(train_on_logits, 2, kind, tiles), ranks2.run(train_on_logits, 1, kind, tiles)
    assert_same(ours[0], theirs[0])


def classify(sp_size: int, stage: int) -> dict:
    """A sequence classifier with batches of two rows and a metric of its logits."""
    from transformers import LlamaForSequenceClassification
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # of the last run: under ZeRO 3 the decoder would be built in its shards

    def collate_classes(samples: list[dict]) -> dict:
        return collate(samples) | {"labels": torch.tensor([len(sample["input_ids"]) % 3 for sample in samples])}

    config = model_config(Cell())
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(11)
    arguments = {
        "data_collator": collate_classes,
        "eval_dataset": documents(7),
        "compute_metrics": lambda found: {"mean": float(found.predictions.mean())},
    }
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForSequenceClassification(config)
        trainer = make_trainer(sp_size, folder, stage, trainer_arguments=arguments, model=model, **options)
        trainer.train()
        result = facts(trainer)
        result["means"] = [line["eval_mean"] for line in trainer.state.log_history if "eval_mean" in line]
        trainer.model_wrapped.destroy()
    return result


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_classifier_is_that_of_sp1(stage, ranks2):
    ours, theirs = ranks2.run(classify, 2, stage), ranks2.run(classify, 1, stage)
    assert_same(ours[0], theirs[0])
    assert ours[0]["means"] == pytest.approx(theirs[0]["means"], rel=1e-4)


def collate_packed(samples: list[dict]) -> dict:
    from transformers import DataCollatorWithFlattening

    rows = [{key: sample[key].tolist() for key in ("input_ids", "labels")} for sample in samples]
    return DataCollatorWithFlattening()(rows)


def train_packed(sp_size: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            sp_size, folder, trainer_arguments={"data_collator": collate_packed}, per_device_train_batch_size=2
        )
        trainer.train()
        trainer.model_wrapped.destroy()
        return [line[key] for line in trainer.state.log_history if "loss" in line for key in ("loss", "grad_norm")]


def test_a_packing_collator_is_that_of_the_run_without_sequence_parallelism(ranks2):
    whole, split = (ranks2.run(train_packed, sp_size)[0] for sp_size in (1, 2))
    assert whole and split == pytest.approx(whole, rel=2e-5)


def accuracy(prediction) -> dict:
    """Next-token accuracy and what was seen of each sample."""
    predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != -100
    return {
        "accuracy": float((predicted == labels)[counted].mean()),
        "tokens": int(counted.sum()),
        "samples": len(labels),
        "checksum": int(predicted[counted].sum()),
    }


def argmax(logits, labels):
    return logits.argmax(-1)


def evaluate(sp_size: int, options: dict, arguments: dict, times: int = 1) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"eval_dataset": documents(7, seed=11)} | arguments
        trainer = make_trainer(sp_size, folder, trainer_arguments=arguments, max_steps=1, **options)
        trainer.train()
        metrics = [trainer.evaluate() for _ in range(times)]
        trainer.model_wrapped.destroy()
    return metrics


EVALUATIONS = {
    "loss only": ({}, {}),
    "metrics": ({}, {"compute_metrics": accuracy, "preprocess_logits_for_metrics": argmax}),
    "metrics of batches of two": (
        {"per_device_eval_batch_size": 2, "stage": 3},
        {"compute_metrics": accuracy, "preprocess_logits_for_metrics": argmax},
    ),
    "label smoothing, tokens averaged on each rank": (
        {"label_smoothing_factor": 0.1, "average_tokens_across_devices": False},
        {"compute_metrics": accuracy, "preprocess_logits_for_metrics": argmax},
    ),
}


# The hardest, and one whose loss is made otherwise.
QUICK_EVALUATIONS = ("metrics of batches of two", "label smoothing, tokens averaged on each rank")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK_EVALUATIONS else pytest.param(name, marks=pytest.mark.slow) for name in EVALUATIONS],
)
def test_seven_samples_on_four_ranks_are_evaluated_as_at_sp1(name, ranks4):
    whole = ranks4.run(evaluate, 1, *EVALUATIONS[name])[0][0]
    for sp_size in (2, 4):
        split = ranks4.run(evaluate, sp_size, *EVALUATIONS[name])[0][0]
        for key in set(whole) - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert split[key] == pytest.approx(whole[key], rel=2e-5), key
    if "compute_metrics" in EVALUATIONS[name][1]:
        assert whole["eval_samples"] == 7


def predict(sp_size: int) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(sp_size, folder, max_steps=1)
        trainer.train()
        predictions = trainer.predict(documents(5, seed=12))
        trainer.model_wrapped.destroy()
    return torch.from_numpy(predictions.predictions)


def test_whole_logits_come_back_where_they_are_asked_for(ranks2):
    whole, split = (ranks2.run(predict, sp_size)[0] for sp_size in (1, 2))
    assert whole.shape == split.shape
    torch.testing.assert_close(split, whole, rtol=2e-4, atol=2e-4)


def evaluate_too_much() -> None:
    from unittest import mock

    with mock.patch("deepspeed_alst.distributed.gather.MAX_BYTES", 1000):
        evaluate(2, {}, {"compute_metrics": accuracy})


def test_more_predictions_than_a_rank_should_hold_are_refused(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(evaluate_too_much)
    assert all(
        isinstance(error, DataError) and "preprocess_logits_for_metrics" in str(error) for error in caught.value.errors
    )


def mean_logit(logits, labels):
    return logits.mean()


def shifted(logits, labels):
    return logits[:, :-1].argmax(-1)


@pytest.mark.parametrize("preprocess", [mean_logit, shifted])
def test_a_preprocessing_that_loses_tokens_is_refused(preprocess, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(evaluate, 2, {}, {"compute_metrics": accuracy, "preprocess_logits_for_metrics": preprocess})
    assert all(isinstance(error, ShapeError) for error in caught.value.errors)


def evaluate_only(sp_size: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(sp_size, folder, stage=3, trainer_arguments={"eval_dataset": documents(3, seed=11)})
        loss = trainer.evaluate()["eval_loss"]
        trainer.model_wrapped.destroy()
    return loss


def test_evaluation_without_training(ranks2):
    whole, split = (ranks2.run(evaluate_only, sp_size)[0] for sp_size in (1, 2))
    assert split == pytest.approx(whole, rel=2e-5)


def train_and_generate(sp_size: int, stage: int) -> tuple[list, list[float]]:
    """Generate after every step, as a callback does it."""
    from transformers import TrainerCallback

    texts = []

    class Generate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            prompt = torch.arange(5 + dist.get_rank())[None]
            out = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
            texts.append(out[0].tolist())

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(sp_size, folder, stage=stage, trainer_arguments={"callbacks": [Generate()]})
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        trainer.model_wrapped.destroy()
    return texts, losses


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_generate_between_steps(stage, ranks2):
    whole, split = (ranks2.run(train_and_generate, sp_size, stage) for sp_size in (1, 2))
    for rank in (0, 1):
        assert split[rank][0] == whole[rank][0]
        assert split[rank][1] == pytest.approx(whole[rank][1], rel=2e-5)
    assert len(whole[1][0][-1]) == 12
