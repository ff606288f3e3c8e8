"""Uploads through the real huggingface_hub client to a Hub on 127.0.0.1, with planted faults. Large files go by LFS;
of Xet, which needs a storage server of its own, only the calls into hf_xet are seen: they are stubbed there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN

from qtool import QtoolError
from qtool.convert.files.source import asking_the_hub
from qtool.share.hub import Target, Upload, fetch, look, publish, quiet_secret, upload_of

REPO = "my-org/My-Model-awq"
WEIGHTS = {"model-1.safetensors": b"first shard" * 50000, "model-2.safetensors": b"second shard" * 50000}
SMALL = {
    "README.md": b"---\nlicense: mit\n---\n# My model\n",
    "config.json": b"{}",
    "qtool/scales.safetensors": b"s" * 99,
}
CONTENT = WEIGHTS | SMALL


@pytest.fixture
def uploads(tmp_path: Path) -> list[Upload]:
    found = []
    for name, content in CONTENT.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
        found.append(Upload(name, tmp_path / "files" / name, len(content), hashlib.sha256(content).hexdigest()))
    return found


def stored(server: Any, revision: str = "main") -> dict[str, bytes]:
    return {n: c for n, c in server.files(REPO, revision).items() if n != ".gitattributes"}


def send(uploads: list[Upload], **target: Any) -> Any:
    return publish(Target(REPO, **target), uploads, [], "An artifact")


def puts(server: Any) -> dict[str, int]:
    return {n: server.puts.get(hashlib.sha256(c).hexdigest(), 0) for n, c in WEIGHTS.items()}


def test_files_read_back_equal_and_a_second_time_nothing_is_new(hub_server: Any, uploads: list[Upload]) -> None:
    first = send(uploads)
    assert stored(hub_server) == CONTENT
    assert first.fresh
    assert first.url == f"{hub_server.endpoint}/{REPO}/commit/{first.commit}"
    commits = len(hub_server.repos[REPO].commits)
    assert commits == 2  # the repository's own and one for all files

    again = send(uploads)
    assert not again.fresh
    assert again.commit == first.commit
    assert len(hub_server.repos[REPO].commits) == commits
    assert puts(hub_server) == {"model-1.safetensors": 1, "model-2.safetensors": 1}


def test_a_private_repository_is_created_private(hub_server: Any, uploads: list[Upload]) -> None:
    send(uploads, private=True)
    assert hub_server.repos[REPO].private


def test_private_cannot_hide_a_public_repository(hub_server: Any, uploads: list[Upload]) -> None:
    send(uploads)
    with pytest.raises(QtoolError, match=r"exists and is public; --private cannot hide it"):
        send(uploads, private=True)


def test_a_branch_is_made_and_main_stays(hub_server: Any, uploads: list[Upload]) -> None:
    send(uploads, revision="w4")
    assert stored(hub_server, "w4") == CONTENT
    assert stored(hub_server) == {}


def test_a_pull_request_leaves_main_alone(hub_server: Any, uploads: list[Upload]) -> None:
    found = send(uploads, pr=True)
    assert found.url == f"{hub_server.endpoint}/{REPO}/discussions/1"
    assert stored(hub_server, "refs/pr/1") == CONTENT
    assert stored(hub_server) == {}


def test_stale_files_go_in_the_same_commit(hub_server: Any, uploads: list[Upload]) -> None:
    send([*uploads, upload_of("old.svg", b"<svg/>")])
    publish(Target(REPO), uploads, ["old.svg"], "Newer")
    assert stored(hub_server) == CONTENT
    assert len(hub_server.repos[REPO].commits) == 3


def test_a_connection_dropped_within_a_file_is_taken_up_again(hub_server: Any, uploads: list[Upload]) -> None:
    hub_server.fail("PUT", "/lfs/", drop=True)
    send(uploads)
    assert stored(hub_server) == CONTENT


def test_after_a_broken_upload_only_the_rest_is_sent(hub_server: Any, uploads: list[Upload]) -> None:
    broken = hashlib.sha256(WEIGHTS["model-2.safetensors"]).hexdigest()
    hub_server.fail("PUT", broken, drop=True, times=6)  # the client tries six times
    with pytest.raises(QtoolError, match=r"Run the same command again: it goes on") as caught:
        send(uploads)
    assert caught.value.exit_code == 3
    assert stored(hub_server) == {}  # nothing half-published is visible
    before = puts(hub_server)["model-1.safetensors"]
    send(uploads)
    assert stored(hub_server) == CONTENT
    assert before == 1
    assert puts(hub_server)["model-1.safetensors"] == 1


def test_a_lost_answer_to_the_commit_ends_in_the_same_files_not_twice(hub_server: Any, uploads: list[Upload]) -> None:
    hub_server.fail("POST", "/commit/", after=True)
    with pytest.raises(QtoolError, match=r"connection broke"):
        send(uploads)
    again = send(uploads)
    assert not again.fresh
    assert stored(hub_server) == CONTENT
    assert len(hub_server.repos[REPO].commits) == 2


def test_a_corrupted_stored_file_is_found_and_withdrawn(hub_server: Any, uploads: list[Upload]) -> None:
    hub_server.fail("PUT", "/lfs/", corrupt=True)
    with pytest.raises(QtoolError, match=r"other contents there \(sha256\).*taken back") as caught:
        send(uploads)
    assert caught.value.exit_code == 1
    assert stored(hub_server) == {}
    send(uploads)
    assert stored(hub_server) == CONTENT


def test_a_corrupted_pull_request_is_withdrawn_there(hub_server: Any, uploads: list[Upload]) -> None:
    hub_server.fail("PUT", "/lfs/", corrupt=True)
    with pytest.raises(QtoolError, match=r"gone from refs/pr/1"):
        send(uploads, pr=True)
    assert stored(hub_server, "refs/pr/1") == {}


@pytest.mark.parametrize(
    ("method", "path", "status", "said", "code"),
    [
        ("POST", "/repos/create", 401, "does not accept the token .planted.. Log in anew with `hf auth login`", 2),
        ("POST", "/repos/create", 403, "no right to do that .planted.. It needs write access", 2),
        ("POST", "/preupload/", 403, "no right to do that", 2),
        ("POST", "/commit/", 401, "does not accept the token", 2),
        ("POST", "/commit/", 409, "it changed meanwhile .planted.. Look at it", 2),
        ("POST", "/commit/", 412, "it changed meanwhile", 2),
        ("POST", "/commit/", 418, "answered 418 .planted.", 2),
        ("POST", "/commit/", 503, "failed with 503 .planted.. Run the same command again", 3),
        ("PUT", "/lfs/", 500, "failed with 500", 3),
    ],
)
def test_refusals_say_what_to_do(
    hub_server: Any, uploads: list[Upload], method: str, path: str, status: int, said: str, code: int
) -> None:
    hub_server.fail(method, path, status=status, times=99)
    with pytest.raises(QtoolError, match=said) as caught:
        send(uploads)
    assert caught.value.exit_code == code
    assert "signature" not in caught.value.message
    assert TOKEN not in caught.value.message
    assert REPO not in hub_server.repos or stored(hub_server) == {}
    hub_server.faults.clear()
    send(uploads)
    assert stored(hub_server) == CONTENT


def test_retry_after_is_waited_for(hub_server: Any, uploads: list[Upload]) -> None:
    hub_server.fail("POST", "/commit/", status=429, headers={"Retry-After": "37"}, times=2)
    send(uploads)
    assert hub_server.waits == [37.0, 37.0]
    assert stored(hub_server) == CONTENT


def test_too_many_requests_end_in_a_message(hub_server: Any, uploads: list[Upload]) -> None:
    hub_server.fail("POST", "/commit/", status=429, times=99)
    with pytest.raises(QtoolError, match=r"asks for fewer requests") as caught:
        send(uploads)
    assert caught.value.exit_code == 3
    assert hub_server.waits == [2.0, 4.0, 8.0, 16.0]


def test_a_wait_of_an_hour_is_a_message_at_once(hub_server: Any, uploads: list[Upload]) -> None:
    hub_server.fail("POST", "/commit/", status=429, headers={"Retry-After": "3600"}, times=99)
    with pytest.raises(QtoolError, match=r"asks for fewer requests"):
        send(uploads)
    assert hub_server.waits == []


def test_a_large_file_that_fails_a_few_times_arrives(hub_server: Any, uploads: list[Upload]) -> None:
    hub_server.fail("PUT", "/lfs/", status=502, times=3)
    send(uploads)
    assert stored(hub_server) == CONTENT


def test_another_ones_namespace_is_refused(hub_server: Any, uploads: list[Upload]) -> None:
    with pytest.raises(QtoolError, match=r"no right to do that .You don't have the rights"):
        publish(Target("their-org/model"), uploads, [], "An artifact")


def test_a_wrong_token_is_named_as_such(
    hub_server: Any, uploads: list[Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(QtoolError, match=r"does not accept the token") as caught:
        send(uploads)
    assert "hf_wrong" not in caught.value.message


def test_without_a_token_nothing_is_tried(
    hub_server: Any, uploads: list[Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.share.hub.token", lambda: None)
    with pytest.raises(QtoolError, match=r"no Hub token: log in with `hf auth login`, or set HF_TOKEN"):
        send(uploads)
    assert hub_server.requests == []


def test_no_hub_at_all(hub_server: Any, uploads: list[Upload], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(QtoolError, match=r"the connection broke .ConnectionRefusedError") as caught:
        send(uploads)
    assert caught.value.exit_code == 3


def test_look_and_fetch(hub_server: Any, uploads: list[Upload], tmp_path: Path) -> None:
    assert look(REPO) is None
    commit = send(uploads).commit
    assert look(REPO, "no-such-branch") is None
    assert fetch(REPO, None, tmp_path / "got") == commit
    assert {n: (tmp_path / "got" / n).read_bytes() for n in CONTENT} == CONTENT


def test_a_text_that_holds_the_token_is_not_uploaded(hub_server: Any) -> None:
    with pytest.raises(QtoolError, match=r"notes.txt: contains your Hub token") as caught:
        quiet_secret({"fine.txt": b"fine", "notes.txt": f"token={TOKEN}".encode()})
    assert TOKEN not in caught.value.message


class Xet:
    """In place of hf_xet's session: what huggingface_hub asks of it arrives in the server's store. ``damage`` is done
    to each file on the way; it may raise."""

    def __init__(self, hub: Any, damage: Callable[[bytes], bytes]) -> None:
        self.hub, self.damage = hub, damage
        self.sent: list[str] = []
        self.asked: dict[str, Any] = {}

    @contextmanager
    def new_upload_commit(self, **asked: Any) -> Iterator[Xet]:
        self.asked = asked
        yield self

    def start_upload_file(self, path: str, sha256: str) -> None:
        self.start_upload_bytes(Path(path).read_bytes(), sha256)

    def start_upload_bytes(self, content: bytes, sha256: str) -> None:
        assert hashlib.sha256(content).hexdigest() == sha256  # the one that verify computed, handed on
        self.hub.objects[sha256] = self.damage(content)
        self.sent.append(sha256)


@pytest.fixture
def xet(hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Xet]:
    def stub(damage: Callable[[bytes], bytes] = bytes) -> Xet:
        session = Xet(hub_server, damage)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: True)
        monkeypatch.setattr("huggingface_hub.utils._xet.get_xet_session", lambda: session)
        return session

    return stub


def test_xet_takes_the_large_files(hub_server: Any, uploads: list[Upload], xet: Callable[..., Xet]) -> None:
    session = xet()
    assert send(uploads).fresh
    assert stored(hub_server) == CONTENT
    large = {hashlib.sha256(c).hexdigest() for n, c in CONTENT.items() if n.endswith(".safetensors")}
    assert set(session.sent) == large
    assert hub_server.puts == {}  # nothing went by LFS
    refresh = f"{hub_server.endpoint}/api/models/{REPO}/xet-write-token/main"
    assert session.asked["token_refresh_url"] == refresh
    assert TOKEN not in str(session.asked["custom_headers"])  # the storage server gets a short-lived one instead
    assert not send(uploads).fresh
    assert len(session.sent) == len(large)


def test_a_file_that_xet_damaged_is_taken_back(hub_server: Any, uploads: list[Upload], xet: Callable[..., Xet]) -> None:
    xet(lambda content: b"?" + content[1:])
    with pytest.raises(QtoolError, match=r"other contents there \(sha256\).*The upload was taken back") as error:
        send(uploads)
    assert error.value.exit_code == 1
    assert stored(hub_server) == {}


@pytest.mark.parametrize("fault", [RuntimeError, ConnectionError, PermissionError])
def test_xet_broken_off_leaves_nothing_and_goes_on(
    hub_server: Any, uploads: list[Upload], xet: Callable[..., Xet], fault: type[Exception]
) -> None:
    def break_off(_: bytes) -> bytes:
        raise fault(f"CAS error at https://storage.example/x?X-Amz-Signature=secret-signature {TOKEN}")

    xet(break_off)
    with pytest.raises(QtoolError, match=rf"the connection broke \({fault.__name__}\). Run the same command") as error:
        send(uploads)
    assert error.value.exit_code == 3
    assert "secret" not in error.value.message
    assert TOKEN not in error.value.message
    assert stored(hub_server) == {}
    xet()
    send(uploads)
    assert stored(hub_server) == CONTENT


def test_retries_of_the_hub_client_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network they were twelve lines above the one that says so; other words of it are heard afterwards."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.manager._clear_cache()  # type: ignore[attr-defined]  # what it was asked before
    heard: list[bool] = []

    def ask() -> None:
        with asking_the_hub("org/name", None, "Stay."):
            heard.append(logger.isEnabledFor(logging.WARNING))
            raise OSError("no network")

    with pytest.raises(QtoolError, match="the Hub cannot be reached"):
        ask()
    assert heard == [False]
    assert logger.isEnabledFor(logging.WARNING)
