"""Train the tiny model sharded by accelerate's FSDP2 on a CPU: `accelerate launch --config_file F fsdp.py JOB.json`.

Accelerate chooses FSDP for GPUs alone. The one thing that is pretended here is the kind of the processes; that they use
gloo and the CPU stays as accelerate found it, and sharding, gathering and clipping are accelerate's and torch's own.
For cases whose recipe asks for CUDA, nothing is pretended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from prebench.data.conversations import open_data
from prebench.data.examples import TrainingData
from prebench.errors import InterruptedRunError
from prebench.export import export
from prebench.model.builder import build_model, build_processor
from prebench.model.tokenizer import train_tokenizer
from prebench.schema import DataConfig, TrainConfig, VariantConfig
from prebench.train.checkpoint import Checkpoints
from prebench.train.log import RunLog
from prebench.train.loop import TrainingInputs, build_regularizer, train
from prebench.train.processes import on_main
from prebench.train.sharding import whole_state
from prebench.train.stage import Stage
from tests.conftest import TINY, WORDS
from tests.data.tiny_conversations import llava_config

SCENES = {"scenes": {"num_images": 12, "questions_per_image": 2}, "easy_vqa": {"num_images": 12}}


def train_case(case: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train a case into `folder/model` and return the log; every stop is an interruption after which it goes on.

    Args:
        case: `recipe`, `regularizer`, `data` (a file; None: generated scenes), `stops` (steps of the whole run).
        folder: for log, checkpoints and export.
    """
    tokenizer = train_tokenizer(WORDS * 20, vocab_size=320)
    processor = build_processor(TINY.vision_tower, tokenizer)
    config = case["data"]
    data: Any = TrainingData(DataConfig.model_validate(SCENES))
    if config is not None:
        data = open_data(llava_config(Path(config)), processor)
    inputs = TrainingInputs(data, processor, features=None)
    block = VariantConfig.model_validate({"name": "v", "regularizer": case["regularizer"]}).regularizer
    recipe = TrainConfig.model_validate(case["recipe"])
    manifest = {"variant": "v", "seed": 0, "config_hash": "c", "parts_hash": "p", "lm_loss": 0, "pre_loss": 0}

    def write(model: Any, name: str, weights: dict[str, Any] | None) -> None:
        on_main(lambda: export(model, processor, folder / name, manifest | {"dtype": "float32"}, weights) and None)

    for stop_at in (*case.get("stops", ()), None):
        log = RunLog(folder / "train.jsonl")
        model = build_model(TINY, tokenizer, 0)
        term = build_regularizer(block, model, 0)
        asked: list[bool] = []

        def stop(asked: list[bool] = asked, stop_at: int | None = stop_at) -> bool:
            asked.append(True)
            return len(asked) == stop_at

        def keep_last(stage: str, done: int, model: Any = model) -> None:
            if (stage, done) == ("instruct", recipe.instruct.steps):
                write(model, "snapshot", whole_state(model, PartialState().is_main_process))

        checkpoints = Checkpoints(folder / "checkpoints", {}, log)
        try:
            train(model, term, recipe, inputs, 0, log.write, checkpoints, stop, keep_last)
        except InterruptedRunError:
            assert stop_at is not None
    write(model, "model", None)
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def pretend_gpus() -> None:
    """Let accelerate take the processes, which are on the CPU, for processes on GPUs."""
    state = PartialState(cpu=True)
    assert state.backend == "gloo" and state.device.type == "cpu" and state.num_processes == 2
    AcceleratorState._reset_state()  # the next case may have another precision
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def watch_stages(seen: list[dict[str, Any]]) -> None:
    """Note in every stage how much of its weights this process holds."""
    run = Stage.run

    def noting(stage: Stage) -> None:
        shared = stage._shared
        optimised = [p for o in stage._optimizers.values() for g in o.param_groups for p in g["params"]]
        parameters = list(shared.objective.parameters())
        seen.append(
            {
                "kind": shared.accelerator.distributed_type.value,
                "sharded": all(isinstance(p, DTensor) for p in [*parameters, *optimised]),
                "share": sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters),
                "units": sum(type(m).__name__.startswith("FSDP") for m in stage._wrapped.modules()),
            }
        )
        run(stage)

    Stage.run = noting  # type: ignore[method-assign]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    noted: list[dict[str, Any]] = []
    watch_stages(noted)
    for name, chosen in job.items():
        if chosen["recipe"]["device"] == "cpu":
            pretend_gpus()
        train_case(chosen, Path(sys.argv[1]).parent / name)
    on_main(lambda: (Path(sys.argv[1]).parent / "seen.json").write_text(json.dumps(noted)))
    PartialState().destroy_process_group()
