"""The Hub's download protocol over folders: model info, file tree, and files with ETag, commit and ranges.

Everything a test wants to go wrong is a field of `Hub`: who is gated, which download is cut and how often.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_the_tests"


@dataclass
class Repo:
    """A repository: its revisions by name (branch, tag), each a folder, and who may read it."""

    revisions: dict[str, Path]
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit of a revision given by name or by commit."""
        commits = {name: commit_of(folder) for name, folder in self.revisions.items()}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def folder(self, commit: str) -> Path:
        return next(folder for folder in self.revisions.values() if commit_of(folder) == commit)


def commit_of(folder: Path) -> str:
    """The commit that stands for a folder: 40 hex digits, as git has them."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


@dataclass
class Hub:
    """What the server serves, what it does wrong, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    cut: str | None = None  # files whose name ends so are cut off in the middle ...
    cuts: int = 0  # ... this many times
    broken: bool = False  # every answer is 500
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> set[str]:
        """The files that were asked for with GET, by name in their repository."""
        gets = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", line) for line in self.requests)
        return {unquote(match[1]) for match in gets if match}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the requests are kept in the hub's list instead."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if self.hub.broken:
            self._error(500, "ServerError", "out of order")
        elif self.headers.get("Authorization") and not self._authorized():
            self._error(401, "Unauthorized", "Invalid credentials in Authorization header")
        elif api:
            self._api(api[1], api[2] or "revision", unquote(api[3] or "main"))
        elif file:
            self._file(file[1], unquote(file[2]), unquote(file[3]))
        else:
            self._error(404, "NotFound", path)

    def _repo(self, name: str) -> Repo | None:
        """The repository, if it is there for who asks; the Hub answers 401 for both kinds of not."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._authorized()):
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _api(self, name: str, what: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        commit = repo.commit(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        folder = repo.folder(commit)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if what == "tree":
            entries = [_entry(name, path) for name, path in zip(names, files, strict=True)]
            self._send(200, json.dumps(entries).encode())
            return
        info = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": []}
        info |= {"gated": "manual" if repo.gated else False, "siblings": [{"rfilename": n} for n in names]}
        self._send(200, json.dumps(info).encode())

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if repo.gated and not self._authorized():
            self._error(403, "GatedRepo", "Access to this model is restricted")
            return
        commit = repo.commit(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        path = repo.folder(commit) / file
        if not path.is_file():
            self._error(404, "EntryNotFound", "Entry not found")
            return
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        headers |= {"X-Linked-Size": str(len(content)), "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(206, content[first:], headers, file)
        else:
            self._send(200, content, headers, file)

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message},
        )

    def _send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, file: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut and file.endswith(self.hub.cut) and self.hub.cuts > 0:
            self.hub.cuts -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)


def _entry(name: str, path: Path) -> dict[str, Any]:
    """A file in a tree listing; weights are in LFS, as on the Hub."""
    content = path.read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if path.suffix in (".safetensors", ".bin"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of localhost while the block runs; `hub.url` says where."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
