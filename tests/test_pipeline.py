"""Work beside the model: its order, its bounds, and what an error does to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from detr_fast.pipeline import Speed, ahead, ahead_in_order, batches, helpers, one_thread, spare_cores


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_results_come_in_order_whatever_is_ready_first(count: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3 == 0))
        return number**2

    with ThreadPoolExecutor(3) as pool:
        assert list(ahead(work, range(20), pool, count)) == [number**2 for number in range(20)]
        assert list(ahead(work, [], pool, count)) == []


def test_no_more_is_begun_than_asked_for() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        results = ahead(lambda number: number, items(), pool, 4)
        for done in range(1, 20):
            next(results)
            assert len(taken) <= done + 4


def test_an_error_comes_where_its_result_would() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise KeyError(number)
        return number

    with ThreadPoolExecutor(2) as pool:
        results = ahead(work, range(10), pool, 8)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError, match="3"):
            next(results)


def test_work_runs_beside_the_caller() -> None:
    started = threading.Event()

    def work(number: int) -> int:
        if number == 1:
            started.set()
        return number

    with ThreadPoolExecutor(1) as pool:
        results = ahead(work, range(3), pool, 2)
        next(results)
        assert started.wait(timeout=10), "the second item was not begun while the first one was looked at"


def test_without_threads_it_is_a_map() -> None:
    assert list(ahead(str, [1, 2], None, 1)) == ["1", "2"]


def test_a_model_on_the_cpu_keeps_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    for threads, expected in ((1, 3), (4, 0), (9, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert spare_cores(torch.device("cpu")) == expected
        assert spare_cores(torch.device("cuda")) == 4
        with helpers(torch.device("cpu")) as pool:
            assert (pool is None) == (expected == 0)


def test_one_thread_makes_the_items_ahead_of_the_caller() -> None:
    makers: set[int] = set()
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            makers.add(threading.get_ident())
            made.append(number)
            yield number

    with ThreadPoolExecutor(1) as pool:
        taken = []
        for item in ahead_in_order(items(), pool, 4):
            taken.append(item)
            assert len(made) <= len(taken) + 4
    assert taken == list(range(20)) and len(makers) == 1 and threading.get_ident() not in makers
    assert list(ahead_in_order([None, 3], None, 4)) == [None, 3]
    assert list(ahead_in_order([], None, 4)) == []


def test_an_error_of_the_items_comes_in_their_order() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("later")

    with ThreadPoolExecutor(1) as pool, one_thread(pool) as thread:
        results = ahead_in_order(items(), thread, 3)
        assert next(results) == 1
        with pytest.raises(KeyError, match="later"):
            next(results)
    with one_thread(None) as thread:
        assert thread is None


def test_batches() -> None:
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches([], 2)) == []


def test_time_belongs_to_the_innermost_part() -> None:
    speed = Speed()

    def slow(items: Iterator[int], seconds: float) -> Iterator[int]:
        for item in items:
            time.sleep(seconds)
            yield item

    inner = speed.timed("inner", slow(iter(range(5)), 0.04))
    assert list(speed.timed("outer", slow(inner, 0.01))) == [0, 1, 2, 3, 4]
    speed.stop(5)
    assert speed.shares["inner"] >= 0.2 and speed.shares["outer"] >= 0.05
    assert sum(speed.shares.values()) == pytest.approx(speed.seconds, rel=0.1)
    assert "bounded by inner" in speed.render() and speed.images == 5
    assert Speed().render() == "no image was done"
