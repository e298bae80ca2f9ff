"""A hub on this machine: what `huggingface_hub` asks of the real one, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories in memory: id → revision → file → content."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        if repo not in self.fake.repos:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        revisions = self.fake.repos[repo]
        files = revisions.get("main" if revision == SHA else revision)
        if files is None:
            self._send(404, {"error": "Invalid rev"}, X_Error_Code="RevisionNotFound")
        return files

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fake.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repo, kind, revision = match.groups()
            files = self._files(repo, revision or "main")
            if files is None:
                return
            if kind == "tree":
                self._send(200, [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ])  # fmt: skip
            else:
                siblings = [{"rfilename": name} for name in files]
                self._send(200, {"id": repo, "sha": SHA, "siblings": siblings})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            files = self._files(repo, revision)
            if files is None:
                return
            if name not in files:
                self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
                return
            etag = hashlib.sha1(files[name]).hexdigest()
            self._send(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=SHA)
        else:
            self._send(404, {"error": f"no {path}"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fake.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.fake.repos[match[1]].setdefault(match[2], {})
            self._send(200, {})
        elif re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            self._send(200, {"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]})  # fmt: skip
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.fake.repos[match[1]][match[2]][entry["value"]["path"]] = content
            url = f"{self.fake.url}/{match[1]}/commit/{SHA}"
            self._send(200, {"commitUrl": url, "commitOid": SHA, "hookOutput": "", "success": True})
        else:
            self._send(404, {"error": f"no {path}"})

    def _create(self, wanted: dict) -> None:
        repo = "/".join(filter(None, [wanted.get("organization"), wanted["name"]]))
        if self.headers.get("Authorization") != "Bearer hf_good":
            self._send(401, {"error": "Invalid username or password."})
            return
        self.fake.repos.setdefault(repo, {"main": {}})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.fake.private.add(repo)
        self._send(200, {"url": f"{self.fake.url}/{repo}", "id": repo})
