"""A small local Hugging Face Hub, for tests of everything that talks to the Hub.

The real, unmodified clients (`huggingface_hub`, `transformers`, `datasets`) reach it through `HF_ENDPOINT`. They read
that variable when they are imported, so a test runs its client code in a subprocess with `hub.env()`:

    with HubServer(tokens={"hf_test": "tester"}) as hub:
        hub.add_repo("dataset", "tester/cats", {"train.parquet": data})
        subprocess.run([sys.executable, "script.py"], env=hub.env(home=tmp_path), check=True)
        assert hub.leaks("hf_test") == []

All state is in memory. There are branches, but no pull requests, organizations or Xet storage: requests for those get an
error. The Hub can be told to fail (`fail_commits`, `drop_lfs`) or to be slow (`slow`). The rules of an uploaded `.gitignore` are not applied.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections import namedtuple
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.hub.hub_repos import GIT_ATTRIBUTES, LFS_SIZE, LFS_SUFFIXES, Blob, HubError, Repo

DATE = "2024-01-01T00:00:00.000Z"

# A repository id is "name" or "owner/name". The lazy second part lets an action after a short id win.
_ID = r"([^/]+(?:/[^/]+)??)"
_ACTIONS = "revision|tree|preupload|commit|resolve|branch"
_REPO_URL = re.compile(
    rf"(?:/api/(model|dataset)s/|/(?!api/)(datasets/)?){_ID}(?:/({_ACTIONS})(/.*)?|\.git/info/lfs/objects/(batch))?"
)
_LFS_OBJECT_URL = re.compile(r"/lfs-storage/([0-9a-f]{64})")
# Status 0: close the connection without an answer, as a broken network does.
_FAILURES = {"unauthorized": 401, "forbidden": 403, "missing": 404, "limited": 429, "unavailable": 503, "drop": 0}

# One file of a commit that a client sent, also if the commit was refused. `data` is None for a deletion.
Upload = namedtuple("Upload", "repo_type repo_id path data")


@dataclass
class Request:
    """One request (header names in lower case) and the status of the answer, None for a dropped connection."""

    method: str
    path: str
    headers: dict[str, str]
    status: int | None = None
    user: str | None = None
    body: bytes = b""  # only while the request is answered: what is uploaded must not be kept twice


class HubServer:
    """The server; a context manager. `tokens` maps each accepted token to the name of its user,
    who may write in the own namespace ("tester/...") only."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = dict(tokens)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.uploads: list[Upload] = []
        self.messages: list[str] = []  # titles and descriptions of all commits that clients sent
        self.lfs_objects: dict[str, bytes] = {}
        self.spilled: list[tuple[str, str]] = []  # (token, where it was seen besides in the Authorization header)
        self._announced_lfs: set[str] = set()
        self._failure, self._fail_everything = None, False
        self._failures_left: int | None = None
        self._retry_after: str | None = None
        self._lfs_drops = 0
        self._slow_seconds, self._slow_path, self._closing = 0.0, "", threading.Event()
        self.before_commit = lambda: None  # a test may put something here that has to come first
        self._lock = threading.RLock()

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True  # an idle kept-alive connection must not hold up the end of a test
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # shutdown() waits for the next poll, so a short poll makes the end of a test fast.
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    # For tests

    def env(self, token: str | None = "hf_test", *, home: os.PathLike | str) -> dict[str, str]:
        """The environment for a client subprocess. `home` becomes HF_HOME: give each test a folder of its own."""
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|.*_proxy$", re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*"}
        # Nothing may leave the machine: no telemetry, version checks, download counters or conversion service.
        env |= dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"), "1")
        env |= dict.fromkeys(("HF_HUB_DISABLE_XET", "DISABLE_SAFETENSORS_CONVERSION"), "1")
        env |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
        return env | ({"HF_TOKEN": token} if token is not None else {})

    def add_repo(
        self, repo_type: str, repo_id: str, files: dict[str, bytes], gated: bool = False, private: bool = False
    ) -> Repo:
        """Put a repository on the Hub, or on an existing one a new commit with exactly these files."""
        with self._lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_type, repo_id))
            repo.private, repo.gated = private, gated
            repo.commit({path: Blob(path, data) for path, data in files.items()})
            return repo

    def files(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision. A repository that a client created also has the `.gitattributes` file of the Hub."""
        return {path: blob.data for path, blob in self.repos[repo_type, repo_id].at(revision)[1].items()}

    def fail_commits(
        self, mode: str | None, everything: bool = False, times: int | None = None, retry_after: str | None = None
    ) -> None:
        """From now on, or so many times, refuse each commit with 401 ("unauthorized"), 403 ("forbidden"), 404 ("missing") or
        429 ("limited"), answer 503 ("unavailable"), or close the connection without an answer ("drop"); None ends this.
        `retry_after` is the header of that name. `everything` fails all requests, as an outage does: the clients then
        repeat some requests for about 20 seconds."""
        if mode is not None and mode not in _FAILURES:
            raise ValueError(f"unknown mode: {mode!r}")
        self._failure, self._fail_everything = mode, everything
        self._failures_left, self._retry_after = times, retry_after

    def drop_lfs(self, times: int) -> None:
        """Close the connection in the middle of so many uploads of LFS objects."""
        self._lfs_drops = times

    def slow(self, seconds: float, path: str = "") -> None:
        """Answer each request whose path holds this text so many seconds later; at once when the server is closed."""
        self._slow_seconds, self._slow_path = seconds, path

    def leaks(self, secret: str) -> list[str]:
        """Where a secret occurs in what clients sent, other than the Authorization header: one line per place."""
        wanted = secret.encode()
        uploads = [(path, path.encode() + (data or b"")) for _, _, path, data in self.uploads]
        places = [f"file {path}" for path, sent in uploads if wanted in sent]
        places += [f"LFS object {oid}" for oid, data in self.lfs_objects.items() if wanted in data]
        places += [f"commit message {message!r}" for message in self.messages if secret in message]
        places += [place for token, place in self.spilled if token == secret]
        return places + [f"{request.method} {request.path}" for request in self.requests if secret in request.path]

    # Access rules

    def _readable(self, call: Request, repo_type: str, repo_id: str) -> Repo:
        """A repository to list. Who may not see a private one cannot tell it from a missing one."""
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and call.user not in repo.readers):
            # The Hub answers 401 to a caller without a token, because logging in may help.
            raise HubError(404 if call.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _check_write(self, call: Request, namespace: str | None) -> None:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        if namespace != call.user:
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def _fail(self) -> None:
        """The failure that `fail_commits` asked for."""
        if not self._failure or self._failures_left == 0:
            return
        if self._failures_left is not None:
            self._failures_left -= 1
        headers = {"Retry-After": self._retry_after} if self._retry_after is not None else None
        raise HubError(_FAILURES[self._failure], "The test Hub fails this request", headers=headers)

    # Answers. Each is a JSON value, or (status, headers, content) for the content of a file.

    def answer(self, call: Request):
        """The answer to one request; raises HubError."""
        path = urlsplit(call.path).path
        if self._slow_seconds and self._slow_path in path:
            self._closing.wait(self._slow_seconds)
        with self._lock:
            if self._fail_everything:
                self._fail()
            token = call.headers.get("authorization", "").removeprefix("Bearer ")
            if token and token not in self.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            call.user = self.tokens.get(token)
            if path == "/api/whoami-v2":
                return self._whoami(call)
            if path == "/api/repos/create":
                return self._create_repo(call)
            if path == "/api/validate-yaml":  # asked before a README is sent
                return {"errors": [], "warnings": []}
            if match := _LFS_OBJECT_URL.fullmatch(path):
                return self._lfs_put(call, match[1])
            if match := _REPO_URL.fullmatch(path):
                api_type, prefix, repo_id, action, rest, batch = match.groups()
                repo = self._readable(call, api_type or ("dataset" if prefix else "model"), repo_id)
                revision, _, inner = (rest or "/main").lstrip("/").partition("/")
                handler = getattr(self, "_" + (batch or action or "revision"))
                return handler(call, repo, unquote(revision), unquote(inner))
        raise HubError(404, f"Sorry, the test Hub has no {call.method} {path}")

    def _whoami(self, call: Request):
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "id": call.user, "name": call.user, "fullname": call.user, "orgs": [], "auth": auth}

    def _create_repo(self, call: Request):
        wanted = json.loads(call.body)
        repo_type, namespace = wanted.get("type") or "model", wanted.get("organization") or call.user
        self._check_write(call, namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        if existing := self.repos.get((repo_type, repo_id)):
            raise HubError(409, f"You already created this {repo_type} repo", url=f"{self.url}/{existing.page}")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.add_repo(repo_type, repo_id, {".gitattributes": GIT_ATTRIBUTES}, private=private)
        return {"url": f"{self.url}/{repo.page}", "name": repo_id}

    def _revision(self, call: Request, repo: Repo, revision: str, _):
        oid, files = repo.at(revision)
        info = {"id": repo.id, "author": repo.owner, "sha": oid, "lastModified": DATE, "createdAt": DATE}
        info |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
        return info | {"downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": path} for path in files]}

    def _branch(self, call: Request, repo: Repo, branch: str, _):
        """Make a branch from another one."""
        self._check_write(call, repo.owner)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.at(json.loads(call.body or b"{}").get("startingPoint", "main"))[0]
        return {}

    def _tree(self, call: Request, repo: Repo, revision: str, folder: str):
        return repo.tree(revision, folder, "recursive=true" in call.path.lower())

    def _resolve(self, call: Request, repo: Repo, revision: str, path: str):
        """The content of a file: all of it, or the part that a Range header asks for."""
        if repo.gated and call.user not in repo.readers:
            # Only the content is gated: listings are public, as on the Hub.
            login = ". You must have access to it and be authenticated to access it. Please log in."
            ask = f" and you are not in the authorized list. Visit {self.url}/{repo.page} to ask for access."
            message = f"Access to {repo.type} {repo.id} is restricted" + (ask if call.user else login)
            raise HubError(403 if call.user else 401, message, "GatedRepo")
        oid, files = repo.at(revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": oid})
        data = files[path].data
        headers = {"X-Repo-Commit": oid, "ETag": f'"{files[path].etag}"', "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
        if not span:
            return 200, headers, data
        start, end = int(span[1]), min(int(span[2] or len(data)) + 1, len(data))
        if start >= end:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        return 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]

    def _preupload(self, call: Request, repo: Repo, revision: str, _):
        """Tell a client which files to send as LFS files, and the hashes of the present ones, which it may skip."""
        self._check_write(call, repo.owner)
        files, answers = repo.at(revision)[1], []
        for wanted in json.loads(call.body)["files"]:
            path = wanted["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or wanted["size"] > LFS_SIZE else "regular"
            oid = files[path].etag if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def _batch(self, call: Request, repo: Repo, *_):
        """Tell a client where to send each LFS object that the Hub does not have yet."""
        self._check_write(call, repo.owner)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(call.body)["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self.lfs_objects:
                self._announced_lfs.add(wanted["oid"])
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs-storage/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, call: Request, oid: str):
        """Store an LFS object. A client sends no token here: on the Hub this address is a signed one."""
        if self._lfs_drops > 0:
            self._lfs_drops -= 1
            raise HubError(0, "dropped")
        if oid not in self._announced_lfs or hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(403, "This is not the content that was announced")
        self.lfs_objects[oid] = call.body
        return {}

    def _commit(self, call: Request, repo: Repo, revision: str, _):
        """Apply a commit: lines of JSON, first a header, then one operation each."""
        self.before_commit()
        header, *operations = [json.loads(line) for line in call.body.splitlines()]
        header = header["value"]
        self.messages.append(f"{header['summary']}\n{header.get('description', '')}")
        changes = [self._change(**operation) for operation in operations]
        # Recorded before any refusal: a test must see what the client gave away.
        self.uploads += [Upload(repo.type, repo.id, path, data) for path, data in changes]
        self._fail()
        self._check_write(call, repo.owner)
        if revision not in repo.branches or "create_pr=" in call.path:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent, files = repo.at(revision)
        if header.get("parentCommit") not in (None, parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for path, data in changes:
            if data is not None:
                files[path] = Blob(path, data)
            elif not (gone := [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]):
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                files = {name: blob for name, blob in files.items() if name not in gone}
        oid = repo.commit(files, revision, header["summary"])
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo.page}/commit/{oid}"}

    def _change(self, key: str, value: dict) -> tuple[str, bytes | None]:
        """The path and the new content of one operation of a commit, None to delete a file or folder."""
        if key == "file":
            return value["path"], base64.b64decode(value["content"])
        if key == "lfsFile" and value["oid"] in self.lfs_objects:
            return value["path"], self.lfs_objects[value["oid"]]
        if key in ("deletedFile", "deletedFolder"):
            return value["path"], None
        raise HubError(400, f"Unknown operation, or an LFS object that was not uploaded: {key} {value['path']}")


class _Handler(BaseHTTPRequestHandler):
    """Reads requests off a connection and writes the answers of the HubServer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise an answer may wait about 40 ms for an acknowledgement

    def _handle(self) -> None:
        call = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        self.server.hub.requests.append(call)
        # Read the body before any answer: what stays in a kept-alive connection is taken for the next request.
        call.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        for token in self.server.hub.tokens:
            others = [value for name, value in call.headers.items() if name != "authorization"]
            if token.encode() in call.body or any(token in value for value in others):
                self.server.hub.spilled.append((token, f"{call.method} {call.path} (headers or body)"))
        try:
            answer = self.server.hub.answer(call)
        except HubError as error:
            answer = error.status, error.headers, json.dumps(error.fields).encode()
            if error.status == 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
        finally:
            call.body = b""
        if not isinstance(answer, tuple):
            answer = 200, {}, json.dumps(answer).encode()
        call.status, headers, content = answer
        self.send_response(call.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, *args) -> None:
        """Silent: `HubServer.requests` is the log."""
