"""The files of a benchmark's data set, fetched once, then offline.

Files come at an exact commit into the Hub's own cache, so that what was fetched once is found without a network, and
never another version of it. (`datasets.load_dataset` falls back to whichever version it has, and no longer runs the
loading script that LiveCodeBench's data set relies on.)
"""

import re
from pathlib import Path

from qtool import QtoolError
from qtool.evaluate.tasks.table import data_sets


def fetch(name: str, revision: str | None = None) -> tuple[list[Path], str]:
    """The files of a benchmark on this machine, and "repository@commit".

    ``revision`` (a commit, tag or branch) instead of the pinned one; the commit it stands for is what is returned.
    Raises QtoolError: exit 3 where the files are neither cached nor to be had, exit 2 for an unknown revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    _, known = data_sets()[name]
    asked = revision or known.revision
    offline = (
        f"Offline, copy the benchmark's own file here (for example {known.local}, or {known.files[0]} of the data set "
        f"{known.repository}) and write `file: PATH` beside `task: {name}`."
    )
    try:
        folder = Path(
            snapshot_download(known.repository, repo_type="dataset", revision=asked, allow_patterns=list(known.files))
        )
    except RevisionNotFoundError as error:
        raise QtoolError(f"task {name!r}: the data set {known.repository} has no revision {asked!r}.") from error
    except (LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise QtoolError(
            f"task {name!r}: the data set {known.repository} at {asked[:12]} is not in the local cache and cannot be "
            f"fetched ({type(error).__name__}). {offline}",
            exit_code=3,
        ) from error
    for pattern in known.files:
        if found := sorted(folder.glob(pattern), key=_natural):
            # A snapshot folder is named by its commit.
            return found, f"{known.repository}@{folder.name}"
    raise QtoolError(
        f"task {name!r}: the data set {known.repository} at {folder.name[:12]} has no file {known.files[0]}, or only a "
        f"part of it is cached. {offline}",
        exit_code=3,
    )


def _natural(path: Path) -> tuple[int, str]:
    number = re.search(r"\d+", path.stem)
    return (int(number[0]) if number else 0, path.name)
