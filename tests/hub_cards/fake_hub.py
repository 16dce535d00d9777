# SPDX-License-Identifier: Apache-2.0
"""A small, strict Hub on loopback: the parts of the API that the real client uses for repositories.

Repositories live in memory as commits, each a whole mapping path -> bytes. Large files go the LFS way (batch, PUT, and
a commit that names their SHA-256), small ones travel in the commit. An unknown request is answered with 404
and kept in `unknown`, so that a test can see what the client asked for in vain.
"""

import base64
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".png", ".mp4")


@dataclass
class Repository:
    """Commits of `main`, the oldest first; pull requests as {number: commit id}."""

    private: bool = False
    commits: list[str] = field(default_factory=list)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)

    def add_commit(self, message: str, tree: dict[str, bytes], pull_request: bool = False) -> str:
        parts = [message, str(len(self.trees))] + [
            f"{path}:{_sha1(content)}" for path, content in sorted(tree.items())
        ]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.trees[commit], self.messages[commit] = tree, message
        if pull_request:
            self.pull_requests[len(self.pull_requests) + 1] = commit
        else:
            self.commits.append(commit)
        return commit

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return self.commits[-1]
        if revision.startswith("refs/pr/"):
            return self.pull_requests.get(int(revision.removeprefix("refs/pr/")))
        return revision if revision in self.trees else None


class FakeHub:
    """Use as a context manager; `url` is what HF_ENDPOINT must be.

    Args:
        fail_on: part of a path; a POST to it is cut off without an answer, as by a broken connection, and a PUT is
            refused (the client would retry for half a minute).
    """

    def __init__(self, fail_on: str | None = None):
        self.repositories: dict[str, Repository] = {}  # by id, with "spaces/" or "datasets/" before it
        self.lfs: dict[str, bytes] = {}
        self.fail_on = fail_on
        self.requests: list[str] = []
        self.unknown: list[str] = []

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.trees[repository.resolve(revision)]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self):
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.body = self._read_body()
        segments = [unquote(segment) for segment in parts.path.strip("/").split("/")]
        self.hub.requests.append(f"{self.command} {parts.path}")
        if self.hub.fail_on and self.hub.fail_on in parts.path and self.command == "PUT":
            self._error(403, "Forbidden", "the storage is closed")
            return
        if self.hub.fail_on and self.hub.fail_on in parts.path and self.command == "POST":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        match self.command, *segments:
            case "POST", "api", "repos", "create":
                self._create()
            case "POST", "api", "validate-yaml":
                self._json({"errors": [], "warnings": []})
            case "POST", "api", ("models" | "spaces" | "datasets") as kind, owner, name, "preupload", revision:
                self._preupload(_key(kind, owner, name), revision)
            case "POST", owner, name, "info", "lfs", "objects", "batch":
                self._lfs_batch()
            case "PUT", "lfs", sha:
                self._lfs_put(sha)
            case "POST", "api", ("models" | "spaces" | "datasets") as kind, owner, name, "commit", revision:
                self._commit(_key(kind, owner, name), revision)
            case "GET", "api", ("models" | "spaces" | "datasets") as kind, owner, name:
                self._info(_key(kind, owner, name), "main")
            case "GET", "api", ("models" | "spaces" | "datasets") as kind, owner, name, "revision", revision:
                self._info(_key(kind, owner, name), revision)
            case "GET", "api", ("models" | "spaces" | "datasets") as kind, owner, name, "tree", revision, *folder:
                self._tree(_key(kind, owner, name), revision, "/".join(folder))
            case (("GET" | "HEAD"), owner, name, "resolve", revision, *path):
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case (("GET" | "HEAD"), ("spaces" | "datasets") as kind, owner, name, "resolve", revision, *path):
                self._resolve(_key(kind, owner, name), revision, "/".join(path))
            case _:
                self.hub.unknown.append(f"{self.command} {parts.path}")
                self._error(404, "EntryNotFound", "unknown to the fake hub")

    # --- writing -----------------------------------------------------------------------------------------------------

    def _create(self):
        wanted = json.loads(self.body)
        repo_id = _key(f"{wanted.get('type', 'model')}s", wanted["organization"], wanted["name"])
        if repo_id.startswith("spaces/") and wanted.get("sdk") not in ("gradio", "docker", "static"):
            self._error(400, "BadRequest", "a Space needs an sdk")
            return
        if repo_id in self.hub.repositories:
            self._json({"error": "You already created this repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
            return
        repository = Repository(private=wanted.get("visibility") == "private")
        repository.add_commit(
            "initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        self.hub.repositories[repo_id] = repository
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def _preupload(self, repo_id, revision):
        tree = self._find(repo_id, revision)
        if tree is None:
            return
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": _oid(file["path"], tree[1][file["path"]]) if file["path"] in tree[1] else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def _lfs_batch(self):
        objects = []
        for item in json.loads(self.body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(item if item["oid"] in self.hub.lfs else {**item, "actions": action})
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, sha):
        if hashlib.sha256(self.body).hexdigest() != sha:
            self._error(400, "BadRequest", "the content does not match its hash")
            return
        self.hub.lfs[sha] = self.body
        self._send(200, b"")

    def _commit(self, repo_id, revision):
        found = self._find(repo_id, revision)
        if found is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(found[1])
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[value["path"]] = self.hub.lfs[value["oid"]]  # a commit may only name what was uploaded
        for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
            del files[value["path"]]
        is_pull_request = self.query.get("create_pr") == ["1"]
        repository = self.hub.repositories[repo_id]
        commit = repository.add_commit(lines[0]["value"]["summary"], files, is_pull_request)
        url = f"{self.hub.url}/{repo_id}"
        answer = {"commitUrl": f"{url}/commit/{commit}", "commitOid": commit}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{len(repository.pull_requests)}"
        self._json(answer)

    # --- reading -----------------------------------------------------------------------------------------------------

    def _info(self, repo_id, revision):
        found = self._find(repo_id, revision)
        if found is not None:
            siblings = [{"rfilename": path} for path in sorted(found[1])]
            private = self.hub.repositories[repo_id].private
            self._json({"id": repo_id, "sha": found[0], "private": private, "tags": [], "siblings": siblings})

    def _tree(self, repo_id, revision, folder):
        found = self._find(repo_id, revision)
        if found is None:
            return
        if folder:  # releases are flat
            self._error(404, "EntryNotFound", f"{folder} does not exist")
            return
        entries = []
        for path, content in sorted(found[1].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _sha1(content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, repo_id, revision, path):
        found = self._find(repo_id, revision)
        if found is None:
            return
        headers = {"X-Repo-Commit": found[0]}
        if path not in found[1]:
            self._error(404, "EntryNotFound", f"{path} does not exist", headers)
            return
        content = found[1][path]
        headers["ETag"] = f'"{_oid(path, content)}"'
        headers["Accept-Ranges"] = "bytes"
        self._send(200, content, headers, "application/octet-stream")

    # --- plumbing ----------------------------------------------------------------------------------------------------

    def _find(self, repo_id, revision) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.trees[commit]

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {}, "application/json")

    def _error(self, status, code, message, headers=None):
        headers = {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers, "application/json")

    def _send(self, status, content, headers=None, kind="text/plain"):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _key(kind: str, owner: str, name: str) -> str:
    return f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # git's name of a file


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else _sha1(content)
