"""The repository of a run: who we are, what goes there on the way and at the end, and what is said when that fails."""

import functools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from vit_hf.errors import TOLD, UserError
from vit_hf.hub.card import card_text
from vit_hf.hub.content import (
    LAST,
    MANIFEST,
    commit_message,
    folder_files,
    newest_checkpoint,
    run_files,
    state_files,
)
from vit_hf.hub.fetch import fetch_checkpoint
from vit_hf.hub.run_uploads import Teller, Uploads, remove_leftovers
from vit_hf.hub.uploader import Commit, Files, Patience, Target, Uploader, one_line, open_api
from vit_hf.training.manifest import NAME, step_of
from vit_hf.training.tracking import warn


@dataclass(frozen=True)
class HubSettings:
    """Sharing a run, as the flags of the same names say."""

    push_to_hub: bool = False
    dry_run: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    hub_revision: str | None = None
    hub_strategy: str = "end"
    resume_from_checkpoint: str = "auto"


@dataclass
class Repository:
    """Where a run is uploaded to, on the way and when it is finished.

    Args:
        name: `user/name`; or that of the folder where the Hub is not asked.
        run: the identity of this start.
        wanted: on the main process, where it is asked for.
        api: None where the Hub is not asked.
    """

    name: str
    folder: Path
    run: dict[str, Any]
    settings: HubSettings
    wanted: bool = False
    api: HfApi | None = None
    patience: Patience = Patience()

    @property
    def resume_from(self) -> str:
        return self.settings.resume_from_checkpoint

    def fetch(self) -> str:
        """Brings the checkpoint that the Hub holds into the folder; on the main process. Raises UserError."""
        if self.settings.dry_run:
            return f"dry run: what {self.name} holds is not downloaded"
        return fetch_checkpoint(self.api, self.name, self.settings.hub_revision, self.folder, self.run)

    def whole(self, checkpoint: Path) -> None:
        """A checkpoint has its final name."""
        self._uploads.whole(checkpoint)

    def due(self, step: int) -> None:
        """All that belongs to a step is done."""
        self._uploads.due(step)

    def leave(self) -> None:
        """The run is over."""
        self._uploads.leave()

    def push(self) -> None:
        """Uploads the finished folder and says where it is.

        Raises:
            UserError: the Hub refused, or was out of order for too long; names the command that uploads the folder later.
        """
        if self.wanted:
            again = f"the same command uploads it and trains nothing; so does: hf auth login && {self._later()}"
            print(f"pushed to {send_folder(self._uploader, self.folder, self._with_state, self.patience, again)}")

    @property
    def _with_state(self) -> bool:
        return self.settings.hub_strategy == "checkpoint"

    @functools.cached_property
    def _uploads(self) -> Uploads:
        on_the_way = self.wanted and self.settings.hub_strategy != "end"
        return Uploads(self._uploader if on_the_way else None, self.folder, self._with_state)

    @functools.cached_property
    def _uploader(self) -> Uploader:
        disable_progress_bars()
        target = Target(self.name, self.settings.hub_private_repo, self.settings.hub_revision)
        return Uploader(self.api, target, Teller(self.folder), self.patience)

    def _later(self) -> str:
        return push_command(self.folder, self.name, self.settings.hub_revision, self.settings.hub_private_repo,
                            self.settings.hub_strategy)  # fmt: skip


def push_command(folder: Path, name: str, revision: str | None, private: bool, strategy: str) -> str:
    """What uploads a folder later."""
    options = f" --hub_revision {shlex.quote(revision)}" if revision else ""
    options += " --private" if private else ""
    options += " --hub_strategy checkpoint" if strategy == "checkpoint" else ""
    return f"vit-hf push {shlex.quote(str(folder))} --hub_model_id {name}{options}"


def send_folder(uploader: Uploader, folder: Path, with_state: bool, patience: Patience, later: str) -> str:
    """Uploads a folder in one commit, after what is under way. Returns the repository's URL.

    Args:
        with_state: its newest checkpoint goes to last-checkpoint/.
        later: how it is done later.

    Raises:
        UserError: it was not uploaded; or the folder holds no model.
    """
    folder_files(folder)
    commit = Commit(
        None, lambda: folder_commit(folder, with_state, uploader.name), (LAST,) if with_state else (), last=True
    )
    uploader.put(commit)
    try:
        finished = uploader.wait(patience.end)
    except KeyboardInterrupt:
        warn(f"the model is complete in {folder}, but not uploaded; {later}")
        raise KeyboardInterrupt(TOLD) from None
    why = uploader.why or ("" if finished else f"it was not finished after {patience.end:.0f} s")
    if why:
        raise UserError(f"the model is complete in {folder}, but the upload failed: {why}; {later}")
    return uploader.url


def folder_commit(folder: Path, with_state: bool, name: str | None = None) -> tuple[str, Files]:
    """Message and files of a folder as it is: a finished run, a checkpoint, or another model. One without a card gets it.

    Args:
        name: of the repository, for the card.

    Raises:
        UserError: the folder holds no model, or none of the checkpoints asked for.
    """
    run, step, checkpoint = folder, None, newest_checkpoint(folder)
    files = folder_files(folder)
    if (folder / MANIFEST).exists() and NAME.fullmatch(folder.resolve().name):
        run, step, checkpoint = folder.resolve().parent, step_of(folder.resolve()), folder
        files |= run_files(run, step)
    if "README.md" not in files:
        try:
            files["README.md"] = card_text(folder, name).encode()
        except ValueError as error:
            raise UserError(f"{folder / 'config.json'} is not JSON ({error})") from None
    if with_state:
        if checkpoint is None:
            raise UserError(f"--hub_strategy checkpoint: {folder} holds no checkpoint; leave the flag out")
        files |= state_files(checkpoint)
    return commit_message(run, step), files


def open_repository(
    accelerator: accelerate.Accelerator, folder: Path, run: dict[str, Any], settings: HubSettings
) -> Repository:
    """Asks the Hub who we are, where something is to be uploaded or downloaded; warns where it does not know us.

    Args:
        run: the identity of this start, for a checkpoint that comes from the Hub.
    """
    main = accelerator.is_main_process and not settings.dry_run
    if main:
        remove_leftovers(folder)
    wanted, name = settings.push_to_hub and main, settings.hub_model_id or folder.resolve().name
    if not wanted and not (main and settings.resume_from_checkpoint == "hub"):
        return Repository(name, folder, run, settings)
    api = open_api()
    name, warning = find_repository(api, name)
    if warning and wanted:
        print(f"warning: {warning}", file=sys.stderr)
    return Repository(name, folder, run, settings, wanted, api)


def find_repository(api: HfApi, name: str) -> tuple[str, str | None]:
    """Asks the Hub who we are, at the start of a run.

    Returns:
        The repository's full name (`user/name`; without the user where the Hub does not tell), and a warning to show where
        the Hub does not know us: training goes on all the same.
    """
    try:
        user = api.whoami()["name"]
        return (name if "/" in name else f"{user}/{name}"), None
    except Exception as error:  # whatever keeps us from the Hub now may be gone when the run ends
        return name, f"--push_to_hub: {one_line(error)}; training goes on, log in with `hf auth login` before it ends"
