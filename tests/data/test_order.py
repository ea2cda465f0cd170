"""The order of examples from files: by position alone, whole epochs, batches alike, workers that change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from prebench.data.conversations import open_data
from prebench.data.order import data_order
from prebench.errors import TrainingError
from prebench.schema import StageConfig
from prebench.train.batches import MicroBatches, TrainingInputs, optimiser_steps
from tests.data.tiny_conversations import good_records, llava_config, tiny_processor, write_records

STAGE = StageConfig(steps=12, batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("order"), good_records(42))


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_processor()


def indices(path: Path, processor: Any, group_by: str, seed: int = 0, number: int = 120) -> list[int]:
    order = data_order(open_data(llava_config(path, group_by=group_by), processor), STAGE, "instruct", seed)
    return [order.index(position) for position in range(number)]


@pytest.mark.parametrize("group_by", ["none", "length", "modality_length"])
def test_position_alone_decides(path: Path, processor: Any, group_by: str) -> None:
    whole = indices(path, processor, group_by)
    assert whole == indices(path, processor, group_by) != indices(path, processor, group_by, seed=1)
    order = data_order(open_data(llava_config(path, group_by=group_by), processor), STAGE, "instruct", 0)
    assert [order.index(position) for position in (100, 3, 50, 119, 0)] == [whole[p] for p in (100, 3, 50, 119, 0)]
    size = 42 if group_by == "none" else 40
    for epoch in range(2):
        seen = whole[epoch * size : (epoch + 1) * size]
        assert len(set(seen)) == size
    assert whole[:size] != whole[size : 2 * size]


def test_grouped_batches_are_alike(path: Path, processor: Any) -> None:
    stage = open_data(llava_config(path), processor).stage("instruct")

    def batches(group_by: str) -> list[list[int]]:
        found = indices(path, processor, group_by, number=40)
        return [found[first : first + 4] for first in range(0, 40, 4)]

    def padding(group_by: str) -> int:
        return sum(4 * stage.lengths[batch].max() - stage.lengths[batch].sum() for batch in batches(group_by))

    mixed = [len(set(stage.has_images[batch])) == 2 for batch in batches("modality_length")]
    assert sum(mixed) <= 1, "one batch may hold what is left of both"
    assert sum(len(set(stage.has_images[batch])) == 2 for batch in batches("none")) > 2
    assert padding("length") < padding("none") / 3


@pytest.mark.parametrize("first", [0, 5])
def test_workers_never_reorder(path: Path, processor: Any, first: int) -> None:
    def hashes(num_workers: int) -> list[str]:
        data = open_data(llava_config(path, num_workers=num_workers), processor)
        stage = STAGE.model_copy(update={"gradient_accumulation_steps": 2})
        inputs = TrainingInputs(data, processor, None)
        batches = MicroBatches(data_order(data, stage, "instruct", 0), inputs, Accelerator(cpu=True))
        return [batch.hash for _, group in optimiser_steps(batches, first, lambda: None) for batch in group]

    plain = hashes(0)
    assert len(plain) == (12 - first) * 2
    assert hashes(2) == plain


def test_what_fails_in_a_worker_is_one_line(tmp_path: Path, processor: Any) -> None:
    path = write_records(tmp_path, good_records(8))
    data = open_data(llava_config(path, num_workers=1), processor)
    (tmp_path / "coco" / "0.png").unlink()
    inputs = TrainingInputs(data, processor, None)
    batches = MicroBatches(data_order(data, STAGE, "instruct", 0), inputs, Accelerator(cpu=True))
    with pytest.raises(Exception, match=r"^.*data\.json:1 \(record 0\): image 'coco/0\.png': no such file") as caught:
        list(optimiser_steps(batches, 0, lambda: None))
    assert not isinstance(caught.value, TrainingError) and "\n" not in str(caught.value)
