"""PRe in transformers' Trainer: a base class and an argument more.

python examples/trainer.py [--steps N] [--output DIR]
"""

from __future__ import annotations

import argparse
from functools import partial

from tiny import collate, examples, model_and_processor
from transformers import Trainer, TrainingArguments

from prebench import PredictiveRegularizer, PredictiveTrainerMixin


class PReTrainer(PredictiveTrainerMixin, Trainer):
    """transformers' Trainer with PRe."""


def main() -> None:
    """Train; the trainer prints lm_loss and pre_loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", default="output/trainer", help="folder of checkpoints and of the trained model")
    args = parser.parse_args()
    model, processor = model_and_processor()
    model.model.vision_tower.requires_grad_(False)
    trainer = PReTrainer(
        model=model,
        regularizer=PredictiveRegularizer(model, layer="half", anchor="pre_llm", weight=0.5),
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=args.steps,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=examples(8),
        data_collator=partial(collate, processor),
    )
    trainer.train()
    trainer.save_model(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
