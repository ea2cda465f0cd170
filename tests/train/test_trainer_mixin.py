"""PRe in transformers' Trainer and in TRL's SFTTrainer: the losses of prebench's core, and checkpoints that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from prebench import PredictiveRegularizer, PredictiveTrainerMixin
from prebench.data.order import data_order
from prebench.errors import ConfigError, StoreError
from prebench.model.builder import build_model
from prebench.model.freezing import freeze_for_stage
from prebench.schema import PredictiveConfig, StageConfig, TrainConfig
from prebench.train.batches import MicroBatches, TrainingInputs
from prebench.train.loop import build_accelerator
from prebench.train.trainer_mixin import PREDICTOR_FILE
from tests.conftest import TINY
from tests.train.conftest import RECIPE

pytestmark = pytest.mark.slow
STEPS, ACCUMULATION = 10, 2
STAGE = {"steps": STEPS, "batch_size": 4, "gradient_accumulation_steps": ACCUMULATION, "learning_rate": 1e-3}
TOLERANCE = 2e-5
"""Of each loss, whose values are about 6 and -1; 1e-6 at the first step. Sums are taken in another order."""


class PReTrainer(PredictiveTrainerMixin, Trainer):
    """As a user writes it."""


def micro_batches(inputs: TrainingInputs) -> list[dict[str, torch.Tensor]]:
    """Return the micro-batches of the core, in order."""
    recipe = TrainConfig.model_validate(RECIPE | {"instruct": STAGE})
    order = data_order(inputs.data, StageConfig.model_validate(STAGE), "instruct", 0)
    found = MicroBatches(order, inputs, build_accelerator(recipe))
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    return [{name: getattr(found[i], name) for name in names} for i in range(len(found))]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes


def trainer(inputs: TrainingInputs, folder: Path, kind: str = "transformers", **changes: Any) -> Any:
    model = build_model(TINY, inputs.processor.tokenizer, 0)
    freeze_for_stage(model, ("multi_modal_projector", "language_model"))
    options: dict[str, Any] = {"model": model, "regularizer": PredictiveRegularizer(model, layer="half", weight=0.5)}
    batches = micro_batches(inputs)
    options |= {"train_dataset": Dataset.from_dict({"number": range(len(batches))})}
    options |= {"data_collator": lambda rows: dict(batches[rows[0]["number"]])}
    if kind == "transformers":
        return PReTrainer(args=TrainingArguments(**arguments(folder, **changes)), **options)
    from trl import SFTConfig, SFTTrainer

    class PReSFTTrainer(PredictiveTrainerMixin, SFTTrainer):
        pass

    changes |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False, "max_length": None}
    args = SFTConfig(**arguments(folder, bf16=False, **changes))
    return PReSFTTrainer(args=args, processing_class=inputs.processor, **options)


def losses(found: Any) -> list[dict[str, float]]:
    return [line for line in found.state.log_history if "pre_loss" in line]


@pytest.fixture(scope="module")
def core(run_training) -> tuple[Any, list[dict[str, Any]]]:
    align = RECIPE["align"] | {"steps": 0}
    return run_training(PredictiveConfig(weight=0.5), align=align, instruct=STAGE)


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_ten_steps_have_the_losses_of_the_core(inputs, core, tmp_path, kind):
    model, log = core
    found = trainer(inputs, tmp_path, kind)
    found.train()
    lines = losses(found)
    assert len(lines) == len(log) == STEPS
    for number, (theirs, ours) in enumerate(zip(lines, log, strict=True)):
        tolerance = TOLERANCE if number else 1e-6
        for name in ("lm_loss", "pre_loss"):
            assert theirs[name] == pytest.approx(ours[name], abs=tolerance, rel=tolerance), (number, name)
        assert theirs["loss"] == pytest.approx(ours["lm_loss"] + 0.5 * ours["pre_loss"], abs=2e-3)  # rounded by it
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
        assert theirs["predictor_grad_norm"] == pytest.approx(ours["predictor_grad_norm"], rel=1e-3)
    assert log[-1]["pre_loss"] < log[0]["pre_loss"] - 0.1, "the predictor learns: equality means something"
    named = dict(found.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(named[name].detach(), parameter.detach(), atol=1e-3, rtol=1e-3)


def test_a_checkpoint_goes_on_and_the_export_is_free_of_it(inputs, tmp_path):
    changes = {"max_steps": 4, "lr_scheduler_type": "constant", "logging_steps": 2}
    whole = trainer(inputs, tmp_path / "whole", **changes)
    whole.train()
    for line in losses(whole):  # means over two steps
        assert line["loss"] == pytest.approx(line["lm_loss"] + 0.5 * line["pre_loss"], abs=2e-3)
    first = trainer(inputs, tmp_path / "parts", **changes | {"max_steps": 2}, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer(inputs, tmp_path / "parts", **changes)
    second.train(resume_from_checkpoint=True)
    assert losses(second)[-1] == pytest.approx(losses(whole)[-1], rel=1e-6)
    for name, value in whole.regularizer.state_dict().items():
        assert torch.equal(second.regularizer.state_dict()[name], value), name
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    names = load_file(checkpoint / "model.safetensors").keys()
    plain = build_model(TINY, inputs.processor.tokenizer, 0)
    plain.save_pretrained(tmp_path / "plain")
    assert names == load_file(tmp_path / "plain" / "model.safetensors").keys()
    second.save_model(str(tmp_path / "export"))
    assert not (tmp_path / "export" / PREDICTOR_FILE).exists()
    (checkpoint / PREDICTOR_FILE).unlink()
    with pytest.raises(StoreError, match=f"{PREDICTOR_FILE}: missing"):
        second.train(resume_from_checkpoint=str(checkpoint))


def test_evaluation_has_the_models_own_loss(inputs, tmp_path):
    found = trainer(inputs, tmp_path, max_steps=1, per_device_eval_batch_size=1)
    found.train()
    evaluated = found.evaluate(found.train_dataset.select([0]))
    batch = micro_batches(inputs)[0]
    with torch.no_grad():
        assert evaluated["eval_loss"] == pytest.approx(found.model(**batch).loss.item(), abs=1e-5)


def test_where_the_trainer_takes_means_of_micro_batches_so_does_pre(inputs, tmp_path):
    found = trainer(inputs, tmp_path, max_steps=1)
    found.model_accepts_loss_kwargs = False
    found.train()
    (line,) = losses(found)
    assert line["loss"] == pytest.approx(line["lm_loss"] + 0.5 * line["pre_loss"], abs=2e-3)
    assert -1 <= line["pre_loss"] <= 1


def test_scaled_gradients_are_refused(inputs, tmp_path):
    try:
        with pytest.raises(ConfigError, match="fp16 scales gradients, the predictor's are not; take bf16"):
            trainer(inputs, tmp_path, fp16=True)
    finally:
        AcceleratorState._reset_state()  # the next test's precision is another
