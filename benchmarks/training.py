"""Training speed: prebench's core with and without PRe, transformers' Trainer, and TRL's SFTTrainer.

    python benchmarks/training.py                              the embedded model
    python benchmarks/training.py --architecture smollm2       random weights of SmolLM2-135M's architecture
    python benchmarks/training.py --device cuda --dtype bfloat16    either on a GPU

The same model object, examples, collation, batch, accumulation, optimizer settings, dtype and threads for all,
and cached features of the vision tower for all (`--input features`) or for none (`--input pixels`). Every round trains
a block of steps with each system, another one first each time, so that a load of the machine meets all; a block's first
step is not timed. Ratios are taken within a round: their geometric mean, with a 95% t interval over rounds. prebench's
systems run in one process, which it sets up as it sets up every process that computes; the trainers run in another,
which they find as Python starts it.

`none` has no regularizer, `baseline` fits the predictor to detached states (weight 0), `pre` is weight 0.5. The
trainers train without PRe, as `none` does, on the same micro-batches, which they pad; `Trainer-sorted` sorts the
examples of a step by length before it shares them out, so that little is padded. What a checkpoint costs is measured
apart: `pre` that writes one per step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import Block, Clock, timed
from datasets import Dataset
from documents import export_smollm2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_table import Machine, table
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput
from trl import SFTConfig, SFTTrainer

from prebench.config import load_preset
from prebench.data.collator import Batch, Collator
from prebench.data.examples import TrainingData
from prebench.data.order import data_order
from prebench.model.builder import build_model, build_processor, build_tokenizer
from prebench.model.freezing import freeze_for_stage
from prebench.runtime import choose_dtype, prepare_cpu
from prebench.schema import DataConfig, PredictiveConfig, StageConfig, TrainConfig
from prebench.store import write_text
from prebench.train.batches import MicroBatches, TrainingInputs
from prebench.train.checkpoint import Checkpoints
from prebench.train.features import cached_features
from prebench.train.log import RunLog
from prebench.train.loop import build_accelerator, build_regularizer, train
from prebench.train.objective import Objective
from prebench.train.packing import packed_attention

WEIGHTS = {"none": None, "baseline": 0.0, "pre": 0.5}
TRAINERS = ("Trainer", "SFTTrainer", "Trainer-sorted")
PAIRS = (("pre", "baseline"), ("pre", "none"), *((name, "none") for name in TRAINERS))
STEPS_BETWEEN = TrainConfig.model_fields["checkpoint_every"].default
"""Steps between two checkpoints."""


def _wall_on_cuda() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "cuda": _wall_on_cuda}


@dataclass
class Setting:
    """What all systems share."""

    model: LlavaForConditionalGeneration
    inputs: TrainingInputs
    stage: StageConfig
    recipe: TrainConfig
    folder: str
    now: Callable[[], float]
    """The clock, in seconds."""


class CachedTower(nn.Module):
    """Stands where the vision tower stood and returns the features that it is given: the trainers' cached input."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Return features [I, N_p, D_v] as the tower's last hidden state."""
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,))


_setting: Setting
"""In a process that computes: what its systems share."""


def main() -> None:
    """Measure and print a table."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="prebench-benchmark-") as folder:
        core, peers = (
            ProcessPoolExecutor(1, get_context("spawn"), _begin, (args, folder, own)) for own in (True, False)
        )
        with core, peers:
            machine = core.submit(_machine).result()
            blocks: dict[str, list[Block]] = {name: [] for name in args.systems}
            for number in range(-1, args.rounds):  # the first warms up and is not counted
                start = number % len(args.systems)
                for name in args.systems[start:] + args.systems[:start]:
                    block = (core if name in WEIGHTS else peers).submit(run_block, name).result()
                    sys.stderr.write(f"round {number}: {name} {block.seconds * 1e3:.1f} ms per step\n")
                    if number >= 0:
                        blocks[name].append(block)
            text = table(args, machine, blocks, PAIRS)
            if "pre" in args.systems:
                seconds = float(np.median([block.seconds for block in blocks["pre"]]))
                text += " " + core.submit(_checkpoint_cost, seconds).result()
    print(text)
    if args.output:
        write_text(args.output, text + "\n")


def _begin(args: argparse.Namespace, folder: str, own: bool) -> None:
    """Prepare a process for prebench's own systems, or for the trainers."""
    global _setting
    if own:
        prepare_cpu(args.threads)
    elif args.threads:
        torch.set_num_threads(args.threads)
    place = Path(folder) / ("core" if own else "trainers")
    place.mkdir()
    _setting = _smollm2(args, place) if args.architecture else _embedded(args, place)


def _machine() -> Machine:
    recipe = _setting.recipe
    peak = _gemm_peak(recipe.device, choose_dtype(recipe.dtype, torch.device(recipe.device)))
    return Machine(torch.get_num_threads(), peak, _flops_per_step(_setting), _setting.stage)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--architecture", choices=["smollm2"], help="random weights of this architecture instead")
    parser.add_argument("--input", choices=["features", "pixels"], default="features")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="per block; default 30, smollm2: 4")
    parser.add_argument("--batch-size", type=int, help="default: the preset's 32; smollm2: 4")
    parser.add_argument("--accumulation", type=int, help="default: the preset's 2; smollm2: 1")
    parser.add_argument("--systems", nargs="+", choices=[*WEIGHTS, *TRAINERS], default=[*WEIGHTS, *TRAINERS])
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        help="default wall; cpu: time on processors, which a loaded machine disturbs less; "
        "cuda (the default there): wall time that waits for the GPU at every reading",
    )
    parser.add_argument("--output", type=Path, help="file for the table, besides stdout")
    args = parser.parse_args()
    args.clock = args.clock or ("cuda" if args.device == "cuda" else "wall")
    if args.steps is None:
        args.steps = 4 if args.architecture else 30
    if args.steps < 2:
        parser.error("--steps: at least 2, as the first is not timed")
    return args


def _embedded(args: argparse.Namespace, folder: Path) -> Setting:
    preset = load_preset("embedded")
    processor = build_processor(preset.model.vision_tower, build_tokenizer())
    model = build_model(preset.model, processor.tokenizer, seed=0)
    return _build_setting(args, folder, model, processor, preset.train.instruct, questions_per_image=8)


def _smollm2(args: argparse.Namespace, folder: Path) -> Setting:
    export_smollm2(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    stage = StageConfig(steps=2, batch_size=4, learning_rate=1e-5)
    return _build_setting(args, folder, model, AutoProcessor.from_pretrained(folder), stage, questions_per_image=4)


def _build_setting(
    args: argparse.Namespace,
    folder: Path,
    model: LlavaForConditionalGeneration,
    processor: Any,
    stage: StageConfig,
    questions_per_image: int,
) -> Setting:
    values = stage.model_dump() | {"steps": args.steps}
    values["batch_size"] = args.batch_size or stage.batch_size
    values["gradient_accumulation_steps"] = args.accumulation or stage.gradient_accumulation_steps
    stage = StageConfig.model_validate(values)
    images = {"num_images": max(64, 2 * stage.batch_size), "questions_per_image": questions_per_image}
    data = TrainingData(DataConfig.model_validate({"scenes": images, "easy_vqa": images}))
    features = cached_features(folder, model, processor, data) if args.input == "features" else None
    recipe = TrainConfig.model_validate(
        {
            "align": stage.model_dump() | {"steps": 0},
            "instruct": stage.model_dump(),
            "log_every": args.steps,  # the first step and the last
            "device": args.device,
            "dtype": args.dtype,
        }
    )
    freeze_for_stage(model, stage.trainable)
    return Setting(model, TrainingInputs(data, processor, features), stage, recipe, str(folder), CLOCKS[args.clock])


def run_block(name: str) -> Block:
    """Train one block of steps with a system: one of WEIGHTS or TRAINERS."""
    block = _core_block(WEIGHTS[name], _setting) if name in WEIGHTS else _trainer_block(name, _setting)
    vars(_setting.model).pop("forward", None)  # TRL and accelerate put theirs in front of the model's own
    return block


def _core_block(weight: float | None, setting: Setting) -> Block:
    clock = Clock(setting.now)
    regularizer = None
    if weight is not None:
        regularizer = build_regularizer(PredictiveConfig(weight=weight), setting.model, seed=0)
    with clock.watching():
        train(setting.model, regularizer, setting.recipe, setting.inputs, 0, lambda _line: clock.step_ended())
    return clock.block(setting.stage.steps)


def _checkpoint_cost(step_seconds: float) -> str:
    """Say what a checkpoint of `pre` costs in wall time, beside the steps between two of them."""
    setting = _setting
    folder, waiting, writing = Path(setting.folder) / "checkpointed", list[float](), list[float]()
    checkpoints = Checkpoints(folder / "checkpoints", {}, RunLog(folder / "train.jsonl"))
    recipe = setting.recipe.model_copy(update={"checkpoint_every": 1})
    regularizer = build_regularizer(PredictiveConfig(weight=0.5), setting.model, seed=0)
    with (
        timed(Checkpoints, "save", time.perf_counter, waiting.append),
        timed(Checkpoints, "_write", time.perf_counter, writing.append),
    ):
        # Waiting after every step keeps the write of one checkpoint out of the next one's time.
        stop, after_step = (lambda: False), (lambda _stage, _done: checkpoints.wait())
        train(setting.model, regularizer, recipe, setting.inputs, 0, lambda _: None, checkpoints, stop, after_step)
    checkpoints.remove()
    wait, written = float(np.median(waiting)), float(np.median(writing))
    share = (wait + written) / (STEPS_BETWEEN * step_seconds)
    return (
        f"A checkpoint (median of {len(waiting)}): training waits {wait * 1e3:.0f} ms, writing beside it takes "
        f"{written * 1e3:.0f} ms; both together are {share:.2%} of {STEPS_BETWEEN} steps."
    )


def _trainer_block(name: str, setting: Setting) -> Block:
    clock = Clock(setting.now)
    stage, model = setting.stage, setting.model
    tower = model.model.vision_tower
    if setting.inputs.features is not None:
        model.model.vision_tower = CachedTower()
    micro_batches = SortedMicroBatches(setting) if name == "Trainer-sorted" else _micro_batches(setting)
    options: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.from_dict({"number": range(len(micro_batches))}),
        "data_collator": lambda rows: _as_inputs(micro_batches[rows[0]["number"]]),
        "callbacks": [_StepEnds(clock)],
    }
    arguments = {
        "output_dir": setting.folder,
        "max_steps": stage.steps,
        "per_device_train_batch_size": 1,  # one item is one collated micro-batch
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": stage.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "use_cpu": setting.recipe.device == "cpu",
        "bf16": setting.recipe.dtype == "bfloat16",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if name != "SFTTrainer":
        trainer = Trainer(args=TrainingArguments(**arguments), **options)
    else:
        more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
        trainer = SFTTrainer(args=SFTConfig(**arguments, **more), processing_class=setting.inputs.processor, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.model.vision_tower = tower
    return clock.block(stage.steps)


class SortedMicroBatches(Sequence[Batch]):
    """The examples of each step as they are drawn, sorted by length before they are shared out."""

    def __init__(self, setting: Setting) -> None:
        self._order = data_order(setting.inputs.data, setting.stage, "instruct", 0)
        self._collate = Collator(setting.inputs.processor, setting.inputs.data, setting.inputs.features)
        self._stage = setting.stage

    def __len__(self) -> int:
        return self._stage.steps * self._stage.gradient_accumulation_steps

    def __getitem__(self, index: Any) -> Any:
        """Return a micro-batch; those of a step are asked for one after the other."""
        stage = self._stage
        step, part = divmod(index, stage.gradient_accumulation_steps)
        if part == 0:
            positions = range(step * stage.batch_size, (step + 1) * stage.batch_size)
            encoded = (self._collate.encode(self._order[position]) for position in positions)
            self._encoded = sorted(encoded, key=lambda one: len(one.input_ids))
        size = stage.batch_size // stage.gradient_accumulation_steps
        return self._collate(self._encoded[part * size : (part + 1) * size])


def _micro_batches(setting: Setting) -> MicroBatches:
    order = data_order(setting.inputs.data, setting.stage, "instruct", 0)
    return MicroBatches(order, setting.inputs, build_accelerator(setting.recipe))


def _as_inputs(batch: Batch) -> dict[str, Any]:
    pictures = batch.pixel_values if batch.vision_features is None else batch.vision_features
    text = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    return text | {"pixel_values": pictures}


class _StepEnds(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.step_ended()


def _gemm_peak(device: str, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Return the machine's FLOP/s in products of square matrices: the best of many."""
    size, now = (8192, CLOCKS["cuda"]) if device == "cuda" else (1024, CLOCKS["wall"])
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), now() + seconds
    while now() < end:
        start = now()
        a @ b
        best = min(best, now() - start)
    return 2 * size**3 / best


def _flops_per_step(setting: Setting) -> float:
    """Return the FLOPs of matrix products in a step of `none`, forward and backward, as torch counts them."""
    micro_batches, objective = _micro_batches(setting), Objective(setting.model, None).train()
    with FlopCounterMode(display=False) as counter, packed_attention(setting.model):
        for index in range(setting.stage.gradient_accumulation_steps):
            batch = micro_batches[index]
            objective(batch).total(batch.num_targets, 1, 0.0).backward()
    objective.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
