"""Learning curves: held out, without effect on training, and equal to what the model really answers."""

from __future__ import annotations

import pytest
import torch

from prebench.data.examples import conversation
from prebench.schema import PredictiveConfig
from prebench.store import read_jsonl
from prebench.train.features import COMPUTED, validation_features
from prebench.train.validation import Validation

PRE = PredictiveConfig(weight=0.5)


def test_validation_changes_nothing(run_training):
    plain, plain_log = run_training(PRE)
    watched, log = run_training(PRE, validate_every=2, validation_images=3)
    for (name, a), (_, b) in zip(plain.named_parameters(), watched.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    training = [line for line in log if line.get("kind") != "validation"]
    assert [line["lm_loss"] for line in training] == [line["lm_loss"] for line in plain_log]
    points = [(line["stage"], line["step"]) for line in log if line.get("kind") == "validation"]
    assert points == [("align", 1), ("instruct", 1), ("instruct", 3)]


@pytest.mark.slow
def test_accuracy_is_what_greedy_decoding_answers(run_training, inputs):
    # Hundreds of steps on few words: some answers are right, some are not.
    model, _ = run_training(None, instruct={"steps": 40, "batch_size": 8, "learning_rate": 5e-3})
    questions = inputs.data.validation(4)
    found = Validation(questions, inputs.processor, frozen=True)(model)
    right: dict[str, list[bool]] = {}
    for question in questions:
        messages = conversation([(question.text, "")])[:1]
        text = inputs.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        batch = inputs.processor(text=text, images=[question.image], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**batch, do_sample=False, max_new_tokens=12)
        answer = output[0, batch["input_ids"].shape[1] :].tolist()
        target = inputs.processor.tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        end = [model.generation_config.eos_token_id]
        right.setdefault(question.type, []).append(answer[: len(target) + 1] == target + end)
    assert found["n"] == len(questions)
    assert found["accuracy"] == {name: pytest.approx(sum(v) / len(v)) for name, v in right.items()}
    assert any(value > 0 for value in found["accuracy"].values())
    assert any(value < 1 for value in found["accuracy"].values())


def test_the_tower_is_read_again_where_it_learns(run_training, inputs):
    first, _ = run_training(None)
    second, _ = run_training(None, seed=1)
    questions = inputs.data.validation(2)
    moving = Validation(questions, inputs.processor, frozen=False)
    moving(first)
    assert moving(second) == Validation(questions, inputs.processor, frozen=True)(second)


def test_features_of_the_study_take_the_place_of_the_tower(run_training, inputs, tmp_path, monkeypatch):
    model, _ = run_training(None)
    questions = inputs.data.validation(3)
    expected = Validation(questions, inputs.processor, frozen=True)(model)
    found = validation_features(tmp_path, model, inputs.processor, inputs.data, 3)
    assert [line["images"] for line in read_jsonl(tmp_path / COMPUTED)] == [6]
    monkeypatch.setattr(model.model.vision_tower, "forward", None)  # whoever asks the tower again fails
    again = validation_features(tmp_path, model, inputs.processor, inputs.data, 3)
    assert [line["images"] for line in read_jsonl(tmp_path / COMPUTED)] == [6]
    for features in (found, again):
        value = Validation(questions, inputs.processor, frozen=True, features=features)(model)
        assert value["accuracy"] == expected["accuracy"] and value["lm_loss"] == pytest.approx(expected["lm_loss"])
    with pytest.raises(TypeError):
        Validation(questions, inputs.processor, frozen=False, features=found)(model)
