"""A hub on this machine: just enough of its protocol for huggingface_hub to download from it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files by commit, and the commit of each branch; `refuses` is an error code for everything."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    refuses: str | None = None


@dataclass
class Hub:
    """What is served, and what was asked for."""

    repositories: dict[str, Repository]
    endpoint: str = ""
    downloads: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    requests: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # said of files, where not the truth


def commit_of(text: str) -> str:
    """A commit's name."""
    return hashlib.sha1(text.encode()).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            hub.requests += 1
            hub.tokens.add(self.headers.get("Authorization"))
            parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
            is_api = parts[:2] == ["api", "models"]
            parts = parts[2:] if is_api else parts
            name, rest = "/".join(parts[:2]), parts[2:]
            repository = hub.repositories.get(name)
            if repository is None:
                return self.fail(401, "RepoNotFound")
            if repository.refuses == "ServerError":
                return self.fail(503, None)
            if repository.refuses == "GatedRepo" and not is_api:  # a page is public, files are not
                return self.fail(403, "GatedRepo")
            revision = rest[1] if len(rest) > 1 else "main"
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                return self.fail(404, "RevisionNotFound")
            files = repository.commits[commit]
            if not is_api:
                path = "/".join(rest[2:])
                if path not in files:
                    return self.fail(404, "EntryNotFound")
                if with_body:
                    hub.downloads.append(path)
                etag = {"ETag": f'"{digest(files[path])}"', "X-Repo-Commit": commit}
                return self.send(200, files[path], etag, with_body)
            if rest[:1] == ["tree"]:
                body: Any = [{"type": "file", "path": p, **about(c)} for p, c in files.items()]
            else:
                listed = [{"rfilename": p, **about(c), **self.said(p)} for p, c in files.items()]
                for entry in listed:
                    entry["blobId"] = entry.pop("oid")
                body = {"id": name, "sha": commit, "siblings": listed, "private": False}
            return self.send(200, json.dumps(body).encode(), {}, with_body)

        def said(self, path: str) -> dict[str, int]:
            return {"size": hub.sizes[path]} if path in hub.sizes else {}

        def fail(self, status: int, code: str | None) -> None:
            headers = {"X-Error-Code": code} if code else {}
            self.send(status, b"{}", headers, with_body=True)

        def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body and self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def digest(content: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def about(content: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    return {"size": len(content), "oid": digest(content)}
