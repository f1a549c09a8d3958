"""The Hugging Face hub in a local folder: what its client library asks for when one uploads and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub(ThreadingHTTPServer):
    """Serves the repositories below a folder: `folder/OWNER/NAME/FILE`.

    Attributes:
        asked: "METHOD path" of every request.
        created: what each repository was created with.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._repository(match[1], (match[2] or "/revision/main").rpartition("/")[2])
        elif match := re.fullmatch(rf"/api/models/([^/]+/[^/]+)/tree/{COMMIT}", path):
            self._json(list(self._entries(self.server.folder / match[1])))
        elif match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            self._file(self.server.folder / match[1] / match[2])
        else:
            self._json({}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self._path()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.server.folder / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self.server.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = self.server.folder / match[1] / line["value"]["path"]
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.server.url}/{match[1]}/commit/{COMMIT}"
            self._json({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._json({}, 404)

    def _path(self) -> str:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        return path

    def _repository(self, name: str, revision: str) -> None:
        if not (self.server.folder / name).is_dir():
            self._json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._json({"error": "not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._json({"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "siblings": []})

    def _entries(self, repository: Path) -> Iterator[dict[str, Any]]:
        for file in sorted(path for path in repository.rglob("*") if path.is_file()):
            path = file.relative_to(repository).as_posix()
            yield {"type": "file", "path": path, "size": file.stat().st_size, "oid": _etag(file)}

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(file.read_bytes(), 200, {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT})

    def _json(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(values).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    """A hub that is reachable within the context."""
    hub = LocalHub(folder)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
