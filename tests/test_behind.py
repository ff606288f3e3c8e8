"""A thread that works behind its giver: in order, bounded, and no fault of it is lost."""

from __future__ import annotations

import threading
import time

import pytest

from qtool.make.behind import Behind


def test_items_are_worked_in_order_beside_their_giver() -> None:
    done: list[tuple[int, str]] = []
    ended = threading.Event()

    def work(item: int) -> None:
        if item == 0:
            assert ended.wait(5)  # the giver goes on meanwhile
        done.append((item, threading.current_thread().name))

    with Behind(work, "writer") as behind:
        behind.give(0)
        assert done == []
        ended.set()
        for item in range(1, 50):
            behind.give(item)
    assert done == [(item, "writer") for item in range(50)]


def test_no_item_waits() -> None:
    """So two are in memory: one in work, one in the making."""
    go, given = threading.Event(), []

    def give() -> None:
        with Behind(lambda _: go.wait(5) or None, "writer") as behind:
            for item in range(4):
                behind.give(item)
                given.append(item)

    giver = threading.Thread(target=give)
    giver.start()
    time.sleep(0.2)
    assert given == [0]
    go.set()
    giver.join(5)
    assert given == [0, 1, 2, 3]


@pytest.mark.parametrize("fault", [OSError("full"), KeyboardInterrupt()])
def test_a_fault_reaches_the_giver_and_nothing_follows_it(fault: BaseException) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 2:
            raise fault
        done.append(item)

    def give(*items: int) -> None:
        with Behind(work, "writer") as behind:
            for item in items:
                behind.give(item)

    with pytest.raises(type(fault)):
        give(*range(100))
    assert done == [0, 1]
    with pytest.raises(type(fault)):
        give(2)  # the last: found at the end of the block


def test_where_the_giver_fails_the_item_in_work_ends() -> None:
    begun, done = threading.Event(), []

    def work(item: int) -> None:
        begun.set()
        time.sleep(0.1)
        done.append(item)

    def give() -> None:
        with Behind(work, "writer") as behind:
            behind.give(0)
            assert begun.wait(5)
            raise ValueError("rounding")

    with pytest.raises(ValueError, match="rounding"):
        give()
    assert done == [0]
