"""The benchmarks qtool knows by name: which data set at which commit, in which format; fetched once, then offline.

Files come at an exact commit into the Hub's own cache, so that what was fetched once is found without a network, and
never another version of it. (`datasets.load_dataset` falls back to whichever version it has, and no longer runs the
loading script that LiveCodeBench's data set relies on.)
"""

import re
from dataclasses import dataclass
from pathlib import Path

from qtool import QtoolError
from qtool.evaluate.tasks.problems import Format


@dataclass(frozen=True)
class Benchmark:
    """A data set on the Hub. ``files`` are patterns, of which the first that matches anything counts."""

    format: Format
    repository: str
    revision: str
    files: tuple[str, ...]
    problems: int
    licence: str
    local: str  # what its publisher's own file is called


BENCHMARKS = {
    "humaneval": Benchmark(
        "humaneval",
        "openai/openai_humaneval",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        ("openai_humaneval/test-*.parquet",),
        164,
        "MIT",
        "HumanEval.jsonl.gz",
    ),
    "humaneval+": Benchmark(
        "humaneval",
        "evalplus/humanevalplus",
        "d32357cf319e50e9c8d8dab5ea876c72b0fd321b",
        ("data/test-*.parquet", "test.jsonl"),
        164,
        "Apache-2.0",
        "HumanEvalPlus.jsonl.gz",
    ),
    "mbpp": Benchmark(
        "mbpp",
        "google-research-datasets/mbpp",
        "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        ("full/test-*.parquet",),
        500,
        "CC-BY-4.0",
        "mbpp.jsonl",
    ),
    "mbpp+": Benchmark(
        "mbpp",
        "evalplus/mbppplus",
        "b2d74c91837c3f2a20c1299ae98133cbe7cfa077",
        ("data/test-*.parquet",),
        378,
        "Apache-2.0",
        "MbppPlus.jsonl.gz",
    ),
    "bigcodebench": Benchmark(
        "bigcodebench",
        "bigcode/bigcodebench",
        "b74c0d0bf70d2c0bc459be537895cca163007f1a",
        ("data/v0.1.4-*.parquet",),
        1140,
        "Apache-2.0",
        "BigCodeBench-v0.1.4.jsonl",
    ),
    "livecodebench": Benchmark(
        "livecodebench",
        "livecodebench/code_generation_lite",
        "0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
        ("test*.jsonl",),
        1055,
        "CC (as its data set card says; the problems are the contest sites')",
        "test6.jsonl",
    ),
    "multipl-e-js": Benchmark(
        "multipl-e",
        "nuprl/MultiPL-E",
        "28441b6024e71d4a1c1c0f6bf171c935cd5a43f2",
        ("humaneval-js/test-*.parquet",),
        161,
        "MIT",
        "humaneval-js-reworded.jsonl",
    ),
}


def is_dated(task: str) -> bool:
    """Whether a window of contest dates can apply: to LiveCodeBench, and to a file, which may be one of it."""
    return BENCHMARKS[task].format == "livecodebench" if task in BENCHMARKS else "." in task


def fetch(name: str, revision: str | None = None) -> tuple[list[Path], str]:
    """The files of a benchmark on this machine, and "repository@commit".

    ``revision`` (a commit, tag or branch) instead of the pinned one; the commit it stands for is what is returned.
    Raises QtoolError: exit 3 where the files are neither cached nor to be had, exit 2 for an unknown revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    known = BENCHMARKS[name]
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
