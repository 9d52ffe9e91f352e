"""Uploads a finished folder to the Hub. Checkpoints, event logs and tokens never go along."""

import shlex
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import accelerate
import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from vit_hf.arguments import without_paths
from vit_hf.errors import UserError

RUN_CONFIG = "run_config.yaml"
# A list of what may go, so that nothing else in the folder ever does.
UPLOADED = [
    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
    "README.md", RUN_CONFIG, "metrics.jsonl", "all_results.json", "learning_curves.png", "*.py",
]  # fmt: skip


@dataclass(frozen=True)
class HubSettings:
    """Sharing the finished folder, as the flags of the same names say."""

    push_to_hub: bool = False
    dry_run: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False


@dataclass(frozen=True)
class Repository:
    """Where a finished folder is uploaded to.

    Args:
        name: `user/name`; or that of the folder where nothing is uploaded.
        wanted: on the main process, where it is asked for.
    """

    name: str
    folder: Path
    wanted: bool
    private: bool

    def push(self) -> None:
        """Uploads the folder and says where it is. Raises UserError as `push`."""
        if self.wanted:
            print(f"pushed to {push(self.folder, self.name, self.private)}")


def open_repository(accelerator: accelerate.Accelerator, folder: Path, settings: HubSettings) -> Repository:
    """Asks the Hub who we are, where something is to be uploaded; warns where it does not know us."""
    wanted = settings.push_to_hub and not settings.dry_run and accelerator.is_main_process
    name = folder.resolve().name
    if wanted:
        name, warning = find_repository(settings.hub_model_id, folder)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    return Repository(name, folder, wanted, settings.hub_private_repo)


def find_repository(hub_model_id: str | None, output_dir: Path) -> tuple[str, str | None]:
    """Asks the Hub who we are, at the start of a run.

    Returns:
        The repository's full name (`user/name`; without the user where the Hub does not tell), by default that of the
        output folder; and a warning to show where the Hub does not know us: training goes on all the same.
    """
    name = hub_model_id or output_dir.resolve().name
    try:
        user = HfApi().whoami()["name"]
        return (name if "/" in name else f"{user}/{name}"), None
    except LocalTokenNotFoundError:
        reason = "no token found"
    except Exception as error:  # whatever keeps us from the Hub now may be gone when the run ends
        reason = _one_line(error)
    return name, f"--push_to_hub: {reason}; training goes on, log in with `hf auth login` before it ends"


def push(output_dir: Path, name: str, private: bool) -> str:
    """Creates the repository where it does not exist and uploads the folder in one commit. Returns its URL.

    Raises:
        UserError: the Hub refused or could not be reached; names the command that uploads the folder later.
    """
    files = [path for path in sorted(output_dir.iterdir()) if path.is_file() and _goes_up(path.name)]
    files += sorted((output_dir / "figures").glob("*.png"))
    try:
        api = HfApi()
        name = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        commit = api.create_commit(
            name,
            operations=[CommitOperationAdd(path.relative_to(output_dir).as_posix(), _content(path)) for path in files],
            commit_message="Upload the model trained with vit_hf",
        )
        return str(commit.repo_url)
    except Exception as error:  # every fault of network and Hub ends alike: the folder stays, the user can repeat it
        # not run_config.yaml: the folder's own has the paths of this machine
        names = (path.relative_to(output_dir).as_posix() for path in files if path.name != RUN_CONFIG)
        options = " ".join(f"--include {shlex.quote(name)}" for name in names)
        options += " --private" if private else ""
        raise UserError(
            f"the model is complete in {output_dir}, but the upload failed: {_one_line(error)}; the same command uploads "
            f"it and trains nothing; so does this, but for {RUN_CONFIG}, which holds local paths: hf auth login && "
            f"hf upload {name} {shlex.quote(str(output_dir))} . {options}"
        ) from None


def _goes_up(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in UPLOADED)


def _content(path: Path) -> Path | bytes:
    """A file as it is uploaded: run_config.yaml without the paths of this machine."""
    if path.name != RUN_CONFIG:
        return path
    flags = without_paths(yaml.safe_load(path.read_text()))
    return yaml.safe_dump(flags, sort_keys=False, allow_unicode=True).encode()


def _one_line(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"the Hub answered {error.response.status_code} {error.response.reason_phrase}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
