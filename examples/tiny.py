"""What stands in for your model and data in the examples: a tiny random LLaVA, generated pictures and questions."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from PIL import Image

from prebench.data.questions import ask
from prebench.data.scenes import generate_scene, render, scene_rng
from prebench.model.builder import build_model, build_processor, build_tokenizer
from prebench.schema import ModelConfig

TOWER = {"pretrained": None, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "image_size": 64}
LANGUAGE_MODEL = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}


def model_and_processor() -> tuple[Any, Any]:
    """Return a LlavaForConditionalGeneration and its processor, as `from_pretrained` would."""
    config = ModelConfig.model_validate({"vision_tower": TOWER, "language_model": LANGUAGE_MODEL})
    tokenizer = build_tokenizer()
    return build_model(config, tokenizer, seed=0), build_processor(config.vision_tower, tokenizer)


def examples(number: int) -> list[tuple[Image.Image, str, str]]:
    """Return pictures, each with a question and its answer."""
    found = []
    for index in range(number):
        scene = generate_scene(0, "train", index)
        question = ask(scene, scene_rng(0, "train", index, stream=1), 1)[0]
        found.append((render(scene)[0], question.text, question.answer))
    return found


def dataset(number: int) -> Dataset:
    """Return them in the prompt-completion format of TRL: columns images, prompt, completion."""
    pictures, questions, answers = zip(*examples(number), strict=True)
    return Dataset.from_dict(
        {
            "images": [[picture] for picture in pictures],
            "prompt": [[{"role": "user", "content": text}] for text in questions],
            "completion": [[{"role": "assistant", "content": text}] for text in answers],
        }
    )


def collate(processor: Any, rows: list[tuple[Image.Image, str, str]]) -> dict[str, Any]:
    """Return a batch with labels on the answers alone."""
    image = processor.image_token
    prompts = [f"{processor.tokenizer.bos_token}{image}{question} " for _, question, _ in rows]
    texts = [p + answer + processor.tokenizer.eos_token for p, (_, _, answer) in zip(prompts, rows, strict=True)]
    pictures = [picture for picture, _, _ in rows]
    batch = processor(images=pictures, text=texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate(prompts):
        only = processor(images=pictures[row], text=prompt, return_tensors="pt", add_special_tokens=False)
        labels[row, : only["input_ids"].shape[1]] = -100
    return {**batch, "labels": labels}
