"""A small Hub on 127.0.0.1, for the real huggingface_hub client: repositories, LFS, commits, branches, pull requests,
downloads, and faults on demand. By hand: `python tests/hub_server.py 8123`, then HF_ENDPOINT=http://127.0.0.1:8123."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "plantedtoken" * 3  # no real one has this form's checksum
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
LFS_SIZE = 1 << 20


@dataclass
class Entry:
    """A file at a commit. ``content`` is what is really stored; ``oid`` a git blob id, or the sha256 it claims."""

    content: bytes
    lfs: bool


@dataclass
class Repo:
    private: bool
    branches: dict[str, str]
    commits: dict[str, dict[str, Entry]]
    pulls: int = 0


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that fit: a status, a dropped connection, a bad disk."""

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    drop: bool = False
    corrupt: bool = False
    after: bool = False  # do the work, then drop the connection: the answer is lost


class Hub:
    """The state of the server. ``writable`` namespaces belong to the planted token."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.puts: dict[str, int] = {}
        self.writable = {"my-org"}
        self.lock = threading.RLock()
        self.endpoint = ""
        self.waits: list[float] = []

    def fail(self, method: str, path: str, **how: Any) -> None:
        self.faults.append(Fault(method, path, **how))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader of the repository sees."""
        return {name: entry.content for name, entry in self._tree(repo, revision).items()}

    def put(self, repo: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository that somebody filled by other means."""
        self.create(repo, private)
        self._commit(repo, "main", {n: Entry(c, n.endswith(LFS_SUFFIXES)) for n, c in files.items()})

    def create(self, repo: str, private: bool) -> None:
        first = {".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)}
        self.repos[repo] = Repo(private, {"main": "0" * 39 + "1"}, {"0" * 39 + "1": first})

    def _tree(self, repo: str, revision: str) -> dict[str, Entry]:
        found = self.repos[repo]
        return found.commits[found.branches.get(revision, revision)]

    def _commit(self, repo: str, branch: str, tree: dict[str, Entry]) -> str:
        found = self.repos[repo]
        said = json.dumps([branch, sorted((n, hashlib.sha256(e.content).hexdigest()) for n, e in tree.items())])
        oid = hashlib.sha1(f"{len(found.commits)}{said}".encode()).hexdigest()
        found.commits[oid] = tree
        found.branches[branch] = oid
        return oid


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        hub = self.hub
        hub.requests.append((self.command, path))
        fault = hub.fault(self.command, path)
        if fault and fault.drop:
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 1000)))  # in the middle of the file
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read()
        if fault and fault.status:
            self._answer(fault.status, {"error": "planted"}, fault.headers)
            return
        self.corrupt, self.lose = bool(fault and fault.corrupt), bool(fault and fault.after)
        for method, pattern, serve in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                with hub.lock:
                    serve(self, *map(unquote, match.groups()))
                return
        self._answer(404, {"error": f"no route for {self.command} {path}"})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, data: Any = None, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "lose", False) and status < 300:
            self.close_connection = True
            self.connection.close()
            return
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def token(self) -> str | None:
        header = self.headers.get("Authorization") or ""
        return header.removeprefix("Bearer ") or None

    def _allowed(self, repo: str, write: bool = False) -> bool:
        if self.token not in (None, TOKEN) or (write and self.token is None):
            self._answer(
                401, {"error": "Invalid username or password."},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )  # fmt: skip
            return False
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.token is None):
            self._answer(404 if self.token else 401, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"})
            return False
        if write and repo.split("/")[0] not in self.hub.writable:
            self._answer(403, {"error": "no"}, {"X-Error-Message": "you need write access to this repository"})
            return False
        return True

    def _revision(self, repo: str, revision: str) -> str | None:
        found = self.hub.repos[repo]
        oid = found.branches.get(revision, revision if revision in found.commits else None)
        if oid is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return oid

    # what the client asks for ------------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or 'my-org'}/{asked['name']}"
        if self.token != TOKEN:
            self._answer(401, {"error": "Invalid username or password."})
        elif repo.split("/")[0] not in self.hub.writable:
            message = "You don't have the rights to create a model under the namespace"
            self._answer(403, {"error": message}, {"X-Error-Message": message})
        elif repo in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo}"})
        else:
            self.hub.create(repo, asked.get("visibility") == "private")
            self._answer(200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def info(self, repo: str, revision: str | None = None) -> None:
        if self._allowed(repo) and (oid := self._revision(repo, revision or "main")):
            files = [{"rfilename": name} for name in self.hub.repos[repo].commits[oid]]
            found = {"id": repo, "modelId": repo, "sha": oid, "private": self.hub.repos[repo].private}
            self._answer(200, found | {"siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str) -> None:
        if self._allowed(repo) and (oid := self._revision(repo, revision)):
            entries = []
            for name, entry in self.hub.repos[repo].commits[oid].items():
                told: dict[str, Any] = {"type": "file", "path": name, "size": len(entry.content)}
                if entry.lfs:
                    sha = hashlib.sha256(entry.content).hexdigest()
                    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {told['size']}\n"
                    told["lfs"] = {"oid": sha, "size": told["size"], "pointerSize": len(pointer)}
                    told["oid"] = blob_id(pointer.encode())
                else:
                    told["oid"] = blob_id(entry.content)
                entries.append(told)
            self._answer(200, entries)

    def refs(self, repo: str) -> None:
        if self._allowed(repo):
            branches = self.hub.repos[repo].branches
            told = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in branches.items()]
            self._answer(200, {"branches": told, "converts": [], "tags": []})

    def branch(self, repo: str, name: str) -> None:
        if self._allowed(repo, write=True):
            found = self.hub.repos[repo]
            if name in found.branches:
                self._answer(409, {"error": "Reference already exists"})
                return
            found.branches[name] = found.branches["main"]
            self._answer(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        if not (self._allowed(repo, write=True) and (oid := self._revision(repo, revision))):
            return
        tree, told = self.hub.repos[repo].commits[oid], []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            here = tree.get(file["path"])
            found = None
            if here is not None:
                found = hashlib.sha256(here.content).hexdigest() if lfs else blob_id(here.content)
            mode = "lfs" if lfs else "regular"
            told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": found})
        self._answer(200, {"files": told, "commitOid": oid})

    def batch(self, repo: str) -> None:
        if not self._allowed(repo, write=True):
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            told = {"oid": asked["oid"], "size": asked["size"]}
            stored = self.hub.objects.get(asked["oid"])
            if stored is None or hashlib.sha256(stored).hexdigest() != asked["oid"]:
                href = f"{self.hub.endpoint}/lfs/{asked['oid']}?signature=secret-signature"
                verify = f"{self.hub.endpoint}/lfs-verify"
                told["actions"] = {"upload": {"href": href, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append(told)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        self.hub.puts[oid] = self.hub.puts.get(oid, 0) + 1
        content = self.body
        if self.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        elif hashlib.sha256(content).hexdigest() != oid:
            self._answer(400, {"error": "the content is not the object's"})
            return
        self.hub.objects[oid] = content
        self._answer(200, {})

    def verify(self) -> None:
        asked = json.loads(self.body)
        fine = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        self._answer(200 if fine else 422, {})

    def commit(self, repo: str, revision: str) -> None:
        pull = self.query.get("create_pr") == ["1"]
        if not (self._allowed(repo, write=True) and (oid := self._revision(repo, revision))):
            return
        found = self.hub.repos[repo]
        tree = dict(found.commits[oid])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                if value.get("parentCommit") not in (None, oid):
                    self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                    return
            elif item["key"] == "file":
                tree[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                tree[value["path"]] = Entry(self.hub.objects[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
        branch = revision
        if pull:
            found.pulls += 1
            branch = f"refs/pr/{found.pulls}"
        new = self.hub._commit(repo, branch, tree)
        told = {"success": True, "commitOid": new, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{new}"}
        if pull:
            told["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{found.pulls}"
        self._answer(200, told)

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.S)
        errors = [] if match and "license:" in match.group(1) else [{"message": "no license"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not (self._allowed(repo) and (oid := self._revision(repo, revision))):
            return
        entry = self.hub.repos[repo].commits[oid].get(name)
        if entry is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = entry.content
        sha = hashlib.sha256(content).hexdigest() if entry.lfs else blob_id(content)
        headers = {"ETag": f'"{sha}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match and self.command == "GET":
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206, content[start:], headers)
        elif self.command == "HEAD":
            self._answer(200, b"", headers | {"Content-Length": str(len(content))})
        else:
            self._answer(200, content, headers)

    def whoami(self) -> None:
        self._answer(200 if self.token == TOKEN else 401, {"name": "my-org", "type": "user"})


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", Handler.create),
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("GET",), rf"/api/models/{ID}", Handler.info),
    (("GET",), rf"/api/models/{ID}/revision/([^/]+)", Handler.info),
    (("GET",), rf"/api/models/{ID}/tree/([^/]+)/?", Handler.tree),
    (("GET",), rf"/api/models/{ID}/refs", Handler.refs),
    (("POST",), rf"/api/models/{ID}/branch/([^/]+)", Handler.branch),
    (("POST",), rf"/api/models/{ID}/preupload/([^/]+)", Handler.preupload),
    (("POST",), rf"/api/models/{ID}/commit/([^/]+)", Handler.commit),
    (("POST",), rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/lfs/([0-9a-f]{64})", Handler.store),
    (("POST",), r"/lfs-verify", Handler.verify),
    (("GET", "HEAD"), rf"/{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]


def serve(port: int = 0) -> Iterator[Hub]:
    """A running hub; on 127.0.0.1 only."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    for running in serve(int(sys.argv[1])):
        print(f"export HF_ENDPOINT={running.endpoint} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
