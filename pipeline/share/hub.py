"""The only code that writes to the network: one commit or one pull request on the Hub, read back and compared."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qtool import QtoolError
from qtool.share.hub_errors import explained, token

ATTEMPTS = 5  # of the commit itself; huggingface_hub repeats the other requests on its own
LONGEST_WAIT = 300.0
SIGNATURE = ".gitattributes"  # what a new repository holds
T = TypeVar("T")


@dataclass(frozen=True)
class Upload:
    """One file: its name in the repository, its bytes or where they lie, its size and sha256."""

    path: str
    source: Path | bytes
    size: int
    sha256: str

    def blob_id(self) -> str:
        """What git calls this content; asked only for files that git itself keeps, which are small."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Target:
    """Where to: a repository, a branch of it, or a pull request against it."""

    repo: str
    revision: str = "main"
    pr: bool = False
    private: bool = False


@dataclass(frozen=True)
class Remote:
    """What a repository holds at a revision: name -> (size, sha256 or None, git blob id)."""

    head: str
    private: bool
    files: dict[str, tuple[int, str | None, str]]


@dataclass(frozen=True)
class Publication:
    """Where it went. ``fresh`` is False where the repository held these very files already."""

    repo: str
    commit: str
    url: str
    fresh: bool


def upload_of(path: str, content: bytes) -> Upload:
    """A file made here, in memory."""
    return Upload(path, content, len(content), hashlib.sha256(content).hexdigest())


def look(repo: str, revision: str = "main") -> Remote | None:
    """None for a repository or a revision that does not exist. Raises QtoolError when the Hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(library_name="qtool")
    with explained(f"looking at {repo}"):
        try:
            info = api.model_info(repo, revision=revision)
            entries = list(api.list_repo_tree(repo, recursive=True, revision=info.sha))
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if error.response.status_code == 401 and token() is not None:
                raise
            return None
    found = {e.path: (e.size, e.lfs.sha256 if e.lfs else None, e.blob_id) for e in entries if isinstance(e, RepoFile)}
    return Remote(str(info.sha), bool(info.private), found)


def differences(uploads: Sequence[Upload], remote: Remote) -> list[str]:
    """Every file that the Hub does not hold as it was sent: size, and sha256 (large files) or git blob id (small)."""
    faults = []
    for upload in uploads:
        if upload.path not in remote.files:
            faults.append(f"{upload.path} is missing")
            continue
        size, sha256, blob = remote.files[upload.path]
        if size != upload.size:
            faults.append(f"{upload.path} has {size} bytes there, {upload.size} here")
        elif (sha256 != upload.sha256) if sha256 else (blob != upload.blob_id()):
            faults.append(f"{upload.path} has other contents there ({'sha256' if sha256 else 'git blob id'})")
    return faults


def publish(
    target: Target, uploads: Sequence[Upload], stale: Sequence[str], message: str, seen: str | None = None
) -> Publication:
    """Upload and commit at once, so that an interruption leaves no file visible; then read everything back.

    Large files that an earlier attempt sent are not sent again. ``stale``: files to remove in the same commit, chosen
    when the head was ``seen``. A commit that does not read back as sent is withdrawn. Raises QtoolError: 1 not as sent,
    2 refused, 3 no connection.
    """
    from huggingface_hub import HfApi

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # warnings show signed addresses
    if token() is None:
        raise QtoolError("no Hub token: log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="qtool")
    before = _prepare(api, target)
    if seen not in (None, before.head):
        raise QtoolError(f"{target.repo}: somebody published there meanwhile. Look at it, then publish again.")
    if not stale and not differences(uploads, before):
        return Publication(target.repo, before.head, f"{api.endpoint}/{target.repo}/commit/{before.head}", False)
    commit = _commit(api, target, uploads, stale, message, before)
    revision = commit.pr_revision or target.revision
    after = look(target.repo, commit.oid)
    faults = differences(uploads, after) if after else ["the commit is not there"]
    if faults:
        _withdraw(api, target.repo, revision, uploads)
        raise QtoolError(
            f"{target.repo}: {'; '.join(faults[:3])}. The upload was taken back: the files are gone from {revision}, "
            "the card with them. Publish again.",
            exit_code=1,
        )
    return Publication(target.repo, commit.oid, commit.pr_url or commit.commit_url, True)


def _prepare(api: Any, target: Target) -> Remote:
    """The repository and the branch, made where they are missing."""
    remote = look(target.repo)
    if remote is None:
        with explained(f"creating {target.repo}"):
            api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    elif target.private and not remote.private:
        raise QtoolError(f"{target.repo}: exists and is public; --private cannot hide it. Choose another name.")
    found = look(target.repo, target.revision)
    if found is None and target.revision != "main":
        with explained(f"creating branch {target.revision} of {target.repo}"):
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        found = look(target.repo, target.revision)
    if found is None:
        raise QtoolError(f"{target.repo}: was created, but cannot be read. Check what your token may read.")
    return found


def _commit(
    api: Any, target: Target, uploads: Sequence[Upload], stale: Sequence[str], message: str, before: Remote
) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    def send() -> Any:
        adds = []
        for upload in uploads:
            adds.append(CommitOperationAdd(upload.path, upload.source))
            adds[-1].upload_info.sha256 = bytes.fromhex(upload.sha256)  # computed by `verify` a moment ago
        gone = [CommitOperationDelete(path, is_folder=False) for path in stale]
        return api.create_commit(
            target.repo, [*gone, *adds], commit_message=message, create_pr=target.pr,
            revision=None if target.revision == "main" else target.revision, parent_commit=before.head,
        )  # fmt: skip

    wait = 1.0
    for attempt in range(1, ATTEMPTS + 1):
        with explained(f"uploading to {target.repo}"):
            try:
                return send()
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status != 429 or attempt == ATTEMPTS:  # 429: nothing was done; after a 5xx nobody knows
                    raise
                asked = error.response.headers.get("Retry-After", "")
                wait = float(asked) if re.fullmatch(r"\d+", asked) else 2 * wait
                if wait > LONGEST_WAIT:
                    raise
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _withdraw(api: Any, repo: str, revision: str, uploads: Sequence[Upload]) -> None:
    from huggingface_hub import CommitOperationDelete

    remote = look(repo, revision)
    there = [upload.path for upload in uploads if remote and upload.path in remote.files]
    with explained(f"taking back a broken upload to {repo} (delete the repository by hand)"):
        api.create_commit(
            repo, [CommitOperationDelete(path, is_folder=False) for path in there], revision=revision,
            commit_message="Withdraw an upload that did not read back as it was sent",
        )  # fmt: skip


def fetch(repo: str, revision: str | None, folder: Path) -> str:
    """Download a repository into ``folder`` (what is there already is not fetched again); returns the commit."""
    from huggingface_hub import HfApi, snapshot_download

    with explained(f"fetching {repo}"):
        commit = str(HfApi(library_name="qtool").model_info(repo, revision=revision).sha)
        snapshot_download(
            repo, revision=commit, local_dir=folder, library_name="qtool",
            ignore_patterns=["*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"],
        )  # fmt: skip
    return commit


def quiet_secret(texts: Mapping[str, bytes], read: Callable[[], str | None] = token) -> None:
    """Refuse to upload a text that contains the token itself. Raises QtoolError naming the file, not the token."""
    secret = (read() or "").encode()
    for path, content in texts.items():
        if secret and secret in content:
            raise QtoolError(f"{path}: contains your Hub token. Remove it (and revoke it: it was written to disk).")
