"""Batches that are computed side by side give what they give one after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from prebench.evaluation.engine import Engine, GenerationRequest
from prebench.evaluation.threads import num_workers, side_by_side
from tests.evaluation.test_engine import _image, _messages


@pytest.fixture
def two_cores() -> Iterator[None]:
    """Let torch believe in two cores, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _count(start: int, stop: int, threads: set[int]) -> Iterator[int]:
    for number in range(start, stop):
        threads.add(threading.get_ident())
        yield number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_item_comes_once(workers: int, two_cores) -> None:
    threads: set[int] = set()
    works = (partial(_count, 10 * i, 10 * i + i, threads) for i in range(10))
    found = list(side_by_side(works, workers))
    assert sorted(found) == [10 * i + k for i in range(10) for k in range(i)]
    assert (threads == {threading.get_ident()}) == (workers == 1)
    assert torch.get_num_threads() == 2


def test_works_meet(two_cores) -> None:
    """Two works are under way at once: each waits for the other."""
    barrier = threading.Barrier(2, timeout=30)

    def work() -> Iterator[int]:
        yield barrier.wait()

    assert sorted(side_by_side([work, work], 2)) == [0, 1]


def test_nothing_is_computed_before_the_last_item_is_done_with(two_cores) -> None:
    """What is written down item by item loses, when killed, one item per thread."""
    begun = []

    def work(name: str) -> Iterator[tuple[str, int]]:
        for number in range(3):
            begun.append((name, number))
            yield name, number

    for name, number in side_by_side([partial(work, "a"), partial(work, "b")], 2):
        time.sleep(0.02)
        assert (name, number + 1) not in begun
    assert len(begun) == 6


def test_an_error_reaches_the_caller_and_ends_all(two_cores) -> None:
    started = []

    def work(number: int) -> Iterator[int]:
        started.append(number)
        if number == 3:
            raise KeyError("the third")
        yield number

    with pytest.raises(KeyError, match="the third"):
        list(side_by_side((partial(work, number) for number in range(100)), 2))
    assert len(started) < 10
    assert torch.get_num_threads() == 2


def test_an_abandoned_iteration_ends_its_threads(two_cores) -> None:
    threads: set[int] = set()
    items = side_by_side((partial(_count, 0, 10**9, threads) for _ in range(2)), 2)
    next(items)
    items.close()
    assert threads.isdisjoint(thread.ident for thread in threading.enumerate())
    assert torch.get_num_threads() == 2


def test_the_engine_answers_the_same_on_two_threads(tiny_export, two_cores) -> None:
    engine = Engine(tiny_export, device="cpu", dtype="float32", token_budget=300)
    assert num_workers(engine.model) == 2
    requests = [GenerationRequest(i, _messages(f"is it {i}?", _image(i % 9)), 8) for i in range(60)]
    side = {answer.key: answer for answer in engine.generate(requests)}
    torch.set_num_threads(1)
    assert num_workers(engine.model) == 1
    alone = Engine(tiny_export, device="cpu", dtype="float32", token_budget=300)
    assert {answer.key: answer for answer in alone.generate(requests)} == side
    assert len({answer.text for answer in side.values()}) > 1
