"""Work that runs behind: one thread that does what it is given, in order, while its giver makes the next."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Behind(Generic[Item]):
    """``work`` is called in a thread of its own, with each item of `give`, in their order. None waits: an item is
    given when the one before it is done, so that two are in memory, one in work and one in the making.

    A fault of ``work`` is raised in the giver: by the next `give`, or at the end of the block. Where the block ends by
    an exception, the item in work ends first.
    """

    def __init__(self, work: Callable[[Item], None], name: str) -> None:
        self._work = work
        self._items: queue.Queue[Item | None] = queue.Queue()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def give(self, item: Item) -> None:
        """Waits until the item before is done. Raises what ``work`` has raised."""
        self._items.join()
        self._raise()
        self._items.put(item)

    def __enter__(self) -> Behind[Item]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._items.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                self._work(item)
            except BaseException as error:  # the giver's to handle, an interrupt too
                self._fault = error
            del item  # it is large
            self._items.task_done()

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault
