"""A server on this machine that answers like the Hugging Face Hub, and the layout of its cache."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves repositories: {OWNER/REPO: {file name: content}}, with the revisions main and COMMIT.

    `denied`: {OWNER/REPO: (HTTP status, error code)}. `requests` lists the requested paths.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.denied: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers the requests that huggingface_hub sends for a download."""

    server: FakeHub

    def do_HEAD(self) -> None:
        """Answer a request for the size and hash of a file."""
        self.respond()

    def do_GET(self) -> None:
        """Answer a request for a list of files or a file."""
        self.respond()

    def log_message(self, *arguments) -> None:
        """Print nothing."""

    def respond(self) -> None:
        """Find the repository and revision of the path, then answer."""
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?.*", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            self.fail(404, "")
            return
        repository = (api or file)[1]
        revision = file[2] if file else api[3] or "main"
        files = self.server.repositories.get(repository)
        if repository in self.server.denied:
            self.fail(*self.server.denied[repository])
        elif files is None:
            self.fail(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.fail(404, "RevisionNotFound")
        elif file and file[3] in files:
            self.send(files[file[3]])
        elif file:
            self.fail(404, "EntryNotFound")
        elif api[2] == "tree":
            self.send_json([describe(name, content) for name, content in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self.send_json({"id": repository, "sha": COMMIT, "siblings": siblings})

    def fail(self, status: int, code: str) -> None:
        """Send an error."""
        self.send(b"", status, {"X-Error-Code": code})

    def send_json(self, value: object) -> None:
        """Send a value as JSON."""
        self.send(json.dumps(value).encode(), more={"Content-Type": "application/json"})

    def send(self, content: bytes, status: int = 200, more: dict | None = None) -> None:
        """Send a response, without its content for HEAD."""
        self.send_response(status)
        headers = {
            "Content-Length": str(len(content)),
            "ETag": f'"{hash_of(content)}"',
            "X-Repo-Commit": COMMIT,
        }
        for name, value in (headers | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def hash_of(content: bytes) -> str:
    """Return the name of a file's blob."""
    return hashlib.sha1(content).hexdigest()


def describe(name: str, content: bytes) -> dict:
    """Return an entry of a list of files."""
    return {"type": "file", "path": name, "size": len(content), "oid": hash_of(content)}


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Run a server in a thread."""
    with FakeHub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def write_cache(cache: Path, repository: str, files: dict[str, bytes], ref: str = "main") -> None:
    """Write files as huggingface_hub caches them after a download of the revision `ref`."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    for name, content in files.items():
        blob = folder / "blobs" / hash_of(content)
        link = folder / "snapshots" / COMMIT / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(COMMIT)
