"""A Hub on loopback: as much of its HTTP protocol as huggingface_hub needs to push and pull models.

Large files live on a second port, another origin, as on the real Hub: the client follows a redirect on the Hub's own
origin and then misses the commit's header.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
LARGE = (".safetensors", ".bin")
PAGE = 3


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        told = json.dumps([len(self.commits), {path: sha256(content) for path, content in files.items()}])
        oid = hashlib.sha1(told.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Fault:
    """The next `times` requests that match are answered by `status`, or cut after `bytes_sent` bytes."""

    method: str
    path: str
    status: int = 0
    bytes_sent: int | None = None
    times: int = 1


class Hub:
    """Both servers and what they hold. `requests` lists (method, path); `received` counts bytes of large files."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.faults: list[Fault] = []
        handler = type("Handler", (Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def seen(self, method: str, pattern: str) -> int:
        return sum(one == method and re.search(pattern, path) is not None for one, path in self.requests)

    def fault(self, method: str, path: str) -> Fault | None:
        for one in self.faults:
            if one.times and one.method == method and re.search(one.path, path):
                one.times -= 1
                return one
        return None


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every small answer waits 40 ms

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: Any) -> None:
        """Sends bytes, or anything else as JSON. Underscores in header names stand for hyphens."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.fault.bytes_sent if self.fault else None
            self.wfile.write(body[:cut])
            self.close_connection = self.close_connection or cut is not None

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.hub.requests.append((self.command, path))
        self.fault = self.hub.fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.read_chunks() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        if self.fault and self.fault.status:
            return self.refuse(self.fault.status, "Injected")
        for method, pattern, act in ROUTES:
            if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                return act(self, **found.groupdict())
        return self.refuse(404, "NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after refusing."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.token not in (WRITER, READER)):
            self.refuse(404 if self.token else 401, "RepoNotFound")
        elif found.gated and self.token != WRITER:
            self.refuse(403, "GatedRepo")
        elif write and self.token != WRITER:
            self.refuse(403, "Forbidden")
        else:
            return found
        return None

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if (repo := self.repo(name)) is None:
            return None
        found = repo.files(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound")
        return found

    def create_repo(self) -> None:
        if self.token != WRITER:
            return self.refuse(403 if self.token else 401, "Forbidden")
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            return self.answer(409, url)
        self.hub.repos[name] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self.hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, url)

    def create_branch(self, name: str, branch: str) -> None:
        if (repo := self.repo(name, write=True)) is None:
            return None
        if branch in repo.branches:
            return self.refuse(409, "BranchExists")
        repo.branches[branch] = repo.branches["main"]
        return self.answer(200, {})

    def info(self, name: str, revision: str | None = None) -> None:
        if (found := self.files(name, revision or "main")) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            private = self.hub.repos[name].private
            told = {"_id": name, "id": name, "modelId": name, "sha": found[0], "private": private, "tags": []}
            self.answer(200, {**told, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        if (found := self.files(name, revision)) is None:
            return
        start = int(self.query.get("cursor", ["0"])[0])
        entries = []
        for path, content in sorted(found[1].items())[start : start + PAGE]:
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        more = start + PAGE < len(found[1])
        next_page = f"{self.hub.endpoint}{self.path.split('&cursor')[0]}&cursor={start + PAGE}"
        self.answer(200, entries, **({"Link": f'<{next_page}>; rel="next"'} if more else {}))

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self.files(name, revision)) is None:
            return None
        oid, files = found
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        content, headers = files[path], {"X_Repo_Commit": oid}
        if not path.endswith(LARGE):
            return self.send_range(content, **headers, ETag=f'"{git_oid(content)}"')
        digest = sha256(content)
        linked = {"X_Linked_ETag": f'"{digest}"', "X_Linked_Size": len(content), "ETag": f'"{digest}"'}
        return self.answer(302, **headers, **linked, Location=f"{self.hub.storage}/large/{digest}")

    def send_range(self, content: bytes, **headers: Any) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.answer(200, content, Accept_Ranges="bytes", **headers)
        self.hub.ranges.append(self.headers["Range"])
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self.answer(206, content[start:stop], Accept_Ranges="bytes", **headers)

    def get_large(self, oid: str) -> None:
        self.send_range(self.hub.large[oid], ETag=f'"{oid}"')

    def put_large(self, oid: str) -> None:
        if sha256(self.body) != oid:
            return self.refuse(400, "WrongDigest")
        self.hub.large[oid] = self.body
        return self.answer(200, ETag=f'"{oid}"')

    def preupload(self, name: str, revision: str) -> None:
        if self.repo(name, write=True) is None or (found := self.files(name, revision)) is None:
            return
        told = []
        for one in json.loads(self.body)["files"]:
            path, large = one["path"], one["path"].endswith(LARGE)
            there = found[1].get(path)
            oid = None if there is None else sha256(there) if large else git_oid(there)
            told.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": told})

    def batch(self, name: str) -> None:
        if self.repo(name, write=True) is None:
            return
        objects = json.loads(self.body)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.large:
                verify = f"{self.hub.endpoint}/verify"
                one["actions"] = {
                    "upload": {"href": f"{self.hub.storage}/large/{one['oid']}"},
                    "verify": {"href": verify},
                }
        self.answer(200, {"transfer": "basic", "objects": objects})

    def verify(self) -> None:
        known = json.loads(self.body)["oid"] in self.hub.large
        self.answer(200, {}) if known else self.refuse(404, "NoSuchObject")

    def commit(self, name: str, revision: str) -> None:
        if (repo := self.repo(name, write=True)) is None or (found := self.files(name, revision)) is None:
            return
        files = dict(found[1])
        for line in self.body.splitlines():
            told = json.loads(line)
            kind, value = told["key"], told["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files)
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def validate(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})


NAME = r"(?P<name>[^/]+/[^/]+)"
MODEL = rf"/api/models/{NAME}"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET HEAD", r"/large/(?P<oid>\w+)", Handler.get_large),
    ("PUT", r"/large/(?P<oid>\w+)", Handler.put_large),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"{MODEL}/branch/(?P<branch>.+)", Handler.create_branch),
    ("GET", MODEL, Handler.info),
    ("GET", rf"{MODEL}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"{MODEL}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("POST", rf"{MODEL}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", r"/verify", Handler.verify),
    ("POST", rf"{MODEL}/commit/(?P<revision>.+)", Handler.commit),
]
