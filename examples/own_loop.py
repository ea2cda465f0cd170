"""PRe in a training loop of your own: three lines more.

    python examples/own_loop.py [--steps N] [--output DIR]

Gradient accumulation is shown, too: the loss is divided by the images of the whole step, as the model's own loss is by
its target tokens.
"""

from __future__ import annotations

import argparse

import torch
from tiny import collate, examples, model_and_processor

from prebench import PredictiveRegularizer

BATCH_SIZE, ACCUMULATION = 4, 2


def main() -> None:
    """Train and print both losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", help="folder of the trained model")
    args = parser.parse_args()
    model, processor = model_and_processor()
    model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    regularizer = PredictiveRegularizer(model, layer="half", anchor="pre_llm", weight=0.5)  # first line
    rows = examples(BATCH_SIZE * ACCUMULATION)
    model.train()
    for step in range(args.steps):
        batches = [collate(processor, rows[i : i + BATCH_SIZE]) for i in range(0, len(rows), BATCH_SIZE)]
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        lm_loss = pre_loss = 0.0
        for batch in batches:
            out = model(**batch, num_items_in_batch=targets)
            loss = out.loss + regularizer.loss(num_images=len(rows))  # second line
            loss.backward()
            lm_loss += out.loss.item()
            pre_loss += regularizer.pre_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        regularizer.step()  # third line
        print(f"step {step}: lm_loss {lm_loss:.4f}, pre_loss {pre_loss:.4f}")
    if args.output:
        model.save_pretrained(args.output)
        processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
