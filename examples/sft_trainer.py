"""PRe in TRL's SFTTrainer, on a data set in TRL's own format; with --lora, adapters alone are trained.

    python examples/sft_trainer.py [--lora] [--steps N] [--output DIR]

Needs the extra: pip install "prebench[trl]".
"""

from __future__ import annotations

import argparse

from peft import LoraConfig
from tiny import dataset, model_and_processor
from trl import SFTConfig, SFTTrainer

from prebench import PredictiveRegularizer, PredictiveTrainerMixin


class PReTrainer(PredictiveTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with PRe."""


def main() -> None:
    """Train; the trainer prints lm_loss and pre_loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", default="output/sft", help="folder of checkpoints and of the trained model")
    args = parser.parse_args()
    model, processor = model_and_processor()
    model.model.vision_tower.requires_grad_(False)
    adapters = LoraConfig(
        r=8, target_modules=r".*language_model.*\.[qkvo]_proj", modules_to_save=["multi_modal_projector"]
    )
    trainer = PReTrainer(
        model=model,
        regularizer=PredictiveRegularizer(model, layer="half", anchor="pre_llm", weight=0.5),
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=args.steps,
            max_length=None,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=dataset(8),
        processing_class=processor,
        peft_config=adapters if args.lora else None,
    )
    trainer.train()
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
