"""Which files were changed last, read out of a git repository by a library: no git is started, no hook or filter of the
repository's settings can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from qtool.context.packages import required
from qtool.convert.text.bounded import Overrun, bounded

COMMITS = 200
MOST_PATHS = 20_000
SECONDS, MEMORY = 30.0, 2 * 2**30


def changed_paths(root: Path) -> list[str]:
    """From the top of ``root``, the newest first; [] where there is no history, or none that can be read in time."""
    required("dulwich")

    def work() -> Iterator[str]:
        yield from _walk(root)

    try:
        found = bounded(work, SECONDS, MEMORY)
    except Overrun as error:
        found = error.done
    return list(dict.fromkeys(found))[:MOST_PATHS]


def _walk(root: Path) -> Iterator[str]:
    from dulwich.errors import NotGitRepository
    from dulwich.repo import Repo

    try:
        opened = Repo.discover(str(root))
    except NotGitRepository:
        return
    with closing(opened) as repository:
        inside = root.resolve().relative_to(Path(repository.path).resolve()).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for entry in repository.get_walker(max_entries=COMMITS):
            for change in entry.changes():
                several = change if isinstance(change, list) else [change]  # of a merge: one for each parent
                found = [one.new.path for one in several if one is not None and one.new is not None and one.new.path]
                for path in (name.decode("utf-8", "replace") for name in found):
                    if path.startswith(prefix):
                        yield path[len(prefix) :]
