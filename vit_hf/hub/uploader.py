"""Commits to a repository of the Hub, one after the other, from a thread: with patience where the Hub is out of order, and
without where it refuses. Nobody waits for it but who calls `wait`.

Only the newest commit that waits is kept: each holds all that the repository shall hold, so an older one that has not been
sent is superseded. This module must not know what is uploaded, and loads no torch.
"""

import email.utils
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils._http import default_client_factory

SOCKET_SECONDS = 60.0  # that the Hub may be silent; the client itself would wait for ever
IN_THE_COMMIT = (".json", ".jsonl", ".md", ".py", ".yaml")  # small texts, sent within it
PASSES = (408, 409, 412, 425, 429)  # statuses below 500 that another try may not meet
Files = dict[str, Path | bytes]


@dataclass(frozen=True)
class Patience:
    """How long is waited, in seconds.

    Args:
        first: after a failed try; doubled after each, up to `longest`, each time with a random part taken off.
        last_try: no new try of the last commit begins later than this.
        end: for the last commit, all in all.
    """

    first: float = 2.0
    longest: float = 300.0
    last_try: float = 600.0
    end: float = 3600.0


@dataclass(frozen=True)
class Target:
    """Where commits go: a repository, made where it is missing, and a branch of it, made from `main` where it is missing."""

    name: str
    private: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class Commit:
    """What one commit leaves in the repository.

    Args:
        step: of the run, where it is one's.
        build: gives the message and {path in the repository: content}; called by the thread, for each try.
        mirrored: folders of the repository ("last-checkpoint/"), of which files that are not in this commit are deleted.
        done: called when the commit is sent or given up, so that its files are not needed any more.
        last: is not superseded, and is tried for a limited time.
    """

    step: int | None
    build: Callable[[], tuple[str, Files]]
    mirrored: tuple[str, ...] = ()
    done: Callable[[], None] = lambda: None
    last: bool = False


def open_api(endpoint: str | None = None, token: str | None = None) -> HfApi:
    """A client that never waits for a silent Hub for ever, and leaves what is said of a failure to us (its own lines hold
    signed addresses)."""

    def client() -> Any:
        made = default_client_factory()
        made.timeout = SOCKET_SECONDS
        return made

    huggingface_hub.set_client_factory(client)
    logging.set_verbosity_error()
    return HfApi(endpoint=endpoint, token=token)


def send(api: HfApi, target: Target, message: str, files: Files, mirrored: tuple[str, ...] = ()) -> tuple[str, str]:
    """Makes one commit: all of it or nothing. Returns the repository's URL and the commit's hash. Raises what the client
    raises."""
    branch = target.revision or "main"
    name, head = _newest_commit(api, target, branch)
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    gone = [one.rfilename for one in head.siblings if one.rfilename.startswith(mirrored or ("\n",))]
    deletions = [CommitOperationDelete(path) for path in gone if path not in files]
    for addition in additions:
        # one at a time: for several the client has a pool of threads, and Python waits for these before it ends
        if not addition.path_in_repo.endswith(IN_THE_COMMIT):
            api.preupload_lfs_files(name, additions=[addition], revision=branch)
    made = api.create_commit(
        name,
        operations=[*additions, *deletions],
        commit_message=message,
        revision=branch,
        parent_commit=head.sha,  # the files to delete are those of this one
    )
    return f"{api.endpoint}/{name}", made.oid


def _newest_commit(api: HfApi, target: Target, branch: str) -> tuple[str, Any]:
    """The repository's full name and what it holds; what is missing is made. Nothing is asked that a token for this one
    repository may not do."""
    name = target.name
    try:
        return name, api.repo_info(name, revision=branch)
    except RevisionNotFoundError:
        pass
    except RepositoryNotFoundError:
        name = api.create_repo(name, private=target.private or None, exist_ok=True).repo_id
    if branch != "main":
        api.create_branch(name, branch=branch, exist_ok=True)
    return name, api.repo_info(name, revision=branch)


class Uploader:
    """Sends commits from one thread. `put` never waits.

    Args:
        tell: called by the thread with what happened, the commit, and details: "uploaded" (url, sha), "upload_failed"
            (why, seconds until the next try; None: it is not tried again), "upload_superseded".
    """

    def __init__(
        self, api: HfApi, target: Target, tell: Callable[..., None], patience: Patience = Patience(), seed: int = 0
    ):
        self._api, self._target, self._tell, self._patience = api, target, tell, patience
        self._random = random.Random(seed)  # of its own: a run's numbers are not touched
        self._changed = threading.Condition()
        self._waiting: Commit | None = None
        self._under_way: Commit | None = None
        self._tries = 0
        self._not_before = 0.0  # time.monotonic() of the next try
        self._hub_asked = False  # that time is the Hub's
        self._give_up_at = float("inf")
        self.name = target.name
        self.url: str | None = None  # of the repository, when a commit was made
        self.why: str | None = None  # the last commit was not sent
        self._thread: threading.Thread | None = None

    def put(self, commit: Commit) -> None:
        """Leaves a commit to the thread."""
        with self._changed:
            superseded, self._waiting = self._waiting, commit
            if commit.last:
                self._give_up_at = time.monotonic() + self._patience.last_try
                if not self._hub_asked:
                    self._not_before = 0.0
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
                self._thread.start()
        if superseded is not None:
            self._drop(superseded)

    def wait(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Waits until nothing is left to send. Returns whether that is so.

        Args:
            enough: looked at a few times a second; true ends the waiting.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while (self._waiting or self._under_way) and time.monotonic() < deadline and not enough():
                if not self._thread.is_alive():  # a fault of ours, which it has printed
                    self.why = "the thread that uploads has died"
                    break
                self._changed.wait(min(0.2, max(deadline - time.monotonic(), 0.0)))
            return not (self._waiting or self._under_way)

    def unsent(self) -> list[int | None]:
        """The steps of the commits that are not sent yet."""
        with self._changed:
            return [one.step for one in (self._under_way, self._waiting) if one is not None]

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None or time.monotonic() < self._not_before:
                    rest = self._not_before - time.monotonic()
                    self._changed.wait(rest if self._waiting is not None and rest > 0 else None)
                commit, self._waiting = self._waiting, None
                self._under_way = commit
            again = self._try(commit)
            with self._changed:
                kept = again and self._waiting is None
                if kept:
                    self._waiting = commit
                self._under_way = None
                self._changed.notify_all()
            if again and not kept:
                self._drop(commit)

    def _try(self, commit: Commit) -> bool:
        """Sends a commit. Returns whether it is to be tried again."""
        try:
            message, files = commit.build()
            self.url, made = send(self._api, self._target, message, files, commit.mirrored)
        except Exception as error:
            self.why = one_line(error)
            pause = self._pause(error)
            late = time.monotonic() + pause > self._give_up_at
            again = not is_refusal(error) and not (commit.last and late)
            self._tell("upload_failed", commit, why=self.why, seconds=round(pause, 1) if again else None)
            if not again:
                commit.done()
            return again
        self._tries, self._not_before, self._hub_asked, self.why = 0, 0.0, False, None
        self._tell("uploaded", commit, url=self.url, sha=made)
        commit.done()
        return False

    def _pause(self, error: Exception) -> float:
        """Seconds until the next try, which it puts down."""
        asked = retry_after(error)
        own = min(self._patience.first * 2**self._tries, self._patience.longest) * self._random.uniform(0.5, 1.0)
        pause = own if asked is None else asked + min(own, 1.0)
        with self._changed:
            self._tries, self._not_before = self._tries + 1, time.monotonic() + pause
            self._hub_asked = asked is not None
        return pause

    def _drop(self, commit: Commit) -> None:
        self._tell("upload_superseded", commit)
        commit.done()


def is_refusal(error: BaseException | None) -> bool:
    """Whether another try would end alike: what the Hub or the disk does not allow, and faults of ours."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code if error.response is not None else 500
            return 400 <= status < 500 and status not in PASSES
        if isinstance(
            error,
            LocalTokenNotFoundError | OfflineModeIsEnabled | FileNotFoundError | PermissionError | ValueError
            | TypeError | LookupError | AttributeError,
        ):  # fmt: skip
            return True
        error = error.__cause__
    return False


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the Hub asks to wait for; None where it does not say. Source: RFC 9110, 10.2.3, and the Hub's header
    `RateLimit: "api";r=0;t=55`."""
    while error is not None:
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        if text := headers.get("retry-after"):
            if text.strip().isdigit():
                return float(text)
            try:
                return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
            except ValueError:
                pass
        if found := re.search(r"\br=0;\s*t=(\d+)", headers.get("ratelimit", "")):
            return float(found[1])
        error = error.__cause__
    return None


def one_line(error: BaseException) -> str:
    """What a failure is, for the user: never with a token, or an address that opens something."""
    told: BaseException | None = error
    while told is not None:
        if isinstance(told, HfHubHTTPError) and told.response is not None:
            return f"the Hub answered {told.response.status_code} {told.response.reason_phrase}"
        told = told.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "no token found"
    text = " ".join(str(error.__cause__ or error).split())
    if token := huggingface_hub.get_token():
        text = text.replace(token, "(token)")
    text = re.sub(r"Bearer [^\s'\"]+|\bhf_\w+|https?://\S+\?\S+", "(hidden)", text)
    return f"{type(error.__cause__ or error).__name__}: {text[:200]}"
