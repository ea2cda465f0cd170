"""A Hugging Face Hub of one's own on this machine: what a download of data sets asks of it, and what can go wrong.

It answers as the real one does: dataset info at a revision with sizes and checksums, files at a commit with ranges and
the Hub's headers, large files through a redirect to another host, errors with the Hub's codes.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"  # noqa: S105
CHUNK = 1 << 16


@dataclass
class Repo:
    """A data set: commits with their files, and branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """Move the main branch to a new commit and return its hash."""
        listing = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
        sha = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()  # noqa: S324
        self.commits[sha] = dict(files)
        self.branches["main"] = sha
        return sha


@dataclass
class Request:
    """One request and what was sent in answer."""

    method: str
    path: str
    range: str | None
    token: str | None
    host: str
    status: int = 0
    sent: int = 0


class Hub(ThreadingHTTPServer):
    """The server; use `running` to start it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.cut: dict[str, list[int]] = {}
        """Per file: after how many bytes its next answers break off."""
        self.instead: dict[str, bytes] = {}
        """Per file: what is sent in its place, whatever the checksums say."""
        self.seconds_per_chunk = 0.0

    @property
    def url(self) -> str:
        """Return the address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repo: str, folder: Path, **more: bytes) -> str:
        """Commit a folder's files as a data set and return the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.repos.setdefault(repo, Repo()).commit(files | more)

    def sent(self, name: str) -> int:
        """Return the bytes that were sent of a file."""
        return sum(request.sent for request in self.requests if request.path.endswith(name))

    def asked(self, part: str) -> list[Request]:
        """Return the requests whose path has a part."""
        return [request for request in self.requests if part in request.path]


@contextmanager
def running() -> Iterator[Hub]:
    """Serve in a thread until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def is_large(name: str) -> bool:
    """Tell whether a file is stored as the Hub stores large ones (LFS)."""
    return name.endswith((".parquet", ".bin"))


def git_hash(content: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        headers = self.headers
        self.request_log = Request(
            self.command, path, headers.get("Range"), headers.get("Authorization"), headers.get("Host", "")
        )
        self.server.requests.append(self.request_log)
        if path.startswith("/api/datasets/"):
            self._info(path.removeprefix("/api/datasets/"), "blobs" in parse_qs(parts.query))
        elif path.startswith("/datasets/"):
            self._resolve(path.removeprefix("/datasets/"))
        elif path.startswith("/cdn/"):
            self._file(path.rpartition("/")[2], path.split("/", 3)[3], {})
        else:
            self._error(404, "EntryNotFound")

    def _repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None:
            # As the real one: who is not logged in may not even know whether it exists.
            self._error(404 if self._logged_in() else 401, "RepoNotFound")
        return repo

    def _logged_in(self) -> bool:
        return self.request_log.token == f"Bearer {TOKEN}"

    def _info(self, rest: str, blobs: bool) -> None:
        name, _, revision = rest.partition("/revision/")
        repo = self._repo(name)
        if repo is None:
            return
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.commits:
            self._error(404, "RevisionNotFound")
            return
        siblings = []
        for path, content in repo.commits[sha].items():
            sibling: dict[str, object] = {"rfilename": path}
            if blobs:
                sibling |= {"size": len(content), "blobId": git_hash(content)}
                if is_large(path):
                    digest = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        self._json({"_id": "0", "id": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def _resolve(self, rest: str) -> None:
        name, _, place = rest.partition("/resolve/")
        revision, _, path = place.partition("/")
        repo = self._repo(name)
        if repo is None:
            return
        if repo.gated and not self._logged_in():
            self._error(401, "GatedRepo")
            return
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            self._error(404, "RevisionNotFound")
            return
        if path not in repo.commits[sha]:
            self._error(404, "EntryNotFound")
            return
        content = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_hash(content)}"'}
        if not is_large(path):
            self._file(path, f"{name}/{sha}/{path}", headers)
            return
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        # Another host name, as the Hub's storage has: a token must not follow there.
        headers["Location"] = f"http://localhost:{self.server.server_port}/cdn/{digest[:8]}/{name}/{sha}/{path}"
        self._head(302, {**headers, "Content-Length": "0"})

    def _file(self, path: str, place: str, headers: dict[str, str]) -> None:
        owner, data_set, sha, name = place.split("/", 3)
        content = self.server.instead.get(name, self.server.repos[f"{owner}/{data_set}"].commits[sha][name])
        start, status = 0, 200
        if self.request_log.range:
            start, status = int(self.request_log.range.removeprefix("bytes=").split("-")[0]), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._head(status, {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(content) - start)})
        if self.command == "HEAD":
            return
        cuts = self.server.cut.get(name) or []
        end = min(len(content), start + cuts.pop(0)) if cuts else len(content)
        for place_ in range(start, end, CHUNK):
            chunk = content[place_ : min(place_ + CHUNK, end)]
            try:
                self.wfile.write(chunk)
            except OSError:  # the client is gone
                self.close_connection = True
                return
            self.request_log.sent += len(chunk)
            time.sleep(self.server.seconds_per_chunk)
        if end < len(content):
            self.close_connection = True

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._head(status, {"X-Error-Code": code, "X-Error-Message": code, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
