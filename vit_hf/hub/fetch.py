"""The checkpoint that a run keeps on the Hub, brought into an output folder on another machine.

Nothing in it is believed: it becomes a checkpoint of the folder when each file has the size and the SHA-256 of its manifest.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from vit_hf.arguments import without_paths
from vit_hf.errors import UserError
from vit_hf.hub.content import LAST, MANIFEST, METRICS, manifest_bytes
from vit_hf.hub.uploader import one_line
from vit_hf.training.files import sync_folder, write_bytes
from vit_hf.training.manifest import BrokenCheckpoint, find, move_aside, read_manifest, step_of

FLAG = "--resume_from_checkpoint hub"


def fetch_checkpoint(api: HfApi, name: str, revision: str | None, output_dir: Path, run: dict[str, Any]) -> str:
    """Downloads last-checkpoint/ into output_dir/checkpoint-N, where it is of a later step than what the folder holds.

    Args:
        run: the identity of this start, which has the paths of this machine: those in the manifest have only last names.

    Returns:
        A line that says what was done.

    Raises:
        UserError: the Hub holds none and neither does the folder, the Hub does not answer, or the files are not those of
            the manifest.
    """
    own = find(output_dir, "auto")[0]
    where = f"{name}{f' ({revision})' if revision else ''}"
    try:
        sha, step = _newest(api, name, revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        sha, step = None, None
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError | ValueError) and not _is_the_hubs(error):
            raise
        raise UserError(f"{FLAG}: {where}: {one_line(error)}; to go on from this folder alone: auto") from None
    if step is None and own is None:
        raise UserError(
            f"{FLAG}: {where} holds no {LAST} that you can read, and {output_dir} no checkpoint; look at --hub_model_id and "
            "--hub_revision, or start anew with auto"
        )
    if step is None or (own is not None and step_of(own) >= step):
        held = "no checkpoint" if step is None else f"step {step}"
        return f"{where} holds {held}: going on from {own.name} of the output folder"
    return _download(api, name, sha, step, output_dir, run)


def _newest(api: HfApi, name: str, revision: str | None) -> tuple[str, int | None]:
    """The commit, and the step of the checkpoint in it."""
    head = api.repo_info(name, revision=revision)
    if LAST + MANIFEST not in [one.rfilename for one in head.siblings]:
        return head.sha, None
    manifest = json.loads(Path(api.hf_hub_download(name, LAST + MANIFEST, revision=head.sha)).read_text())
    step = manifest.get("step") if isinstance(manifest, dict) else None
    if type(step) is not int or not 0 <= step < 10**15:
        raise ValueError(f"the manifest says step {step!r:.40}")
    return head.sha, step


def _is_the_hubs(error: Exception) -> bool:
    """Whether the Hub, or the way to it, is what failed. (The client's library is httpx or httpx2, by its version.)"""
    return isinstance(error, HfHubHTTPError) or type(error).__module__.startswith("httpx")


def _download(api: HfApi, name: str, sha: str, step: int, output_dir: Path, run: dict[str, Any]) -> str:
    temporary, final = output_dir / f"checkpoint-{step}.tmp", output_dir / f"checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        api.snapshot_download(name, revision=sha, allow_patterns=[f"{LAST}*", METRICS], local_dir=temporary)
        folder = temporary / LAST
        manifest = read_manifest(folder)
        if manifest["step"] != step:
            raise BrokenCheckpoint(f"it is of step {manifest['step']}, and was of step {step} a moment ago")
        for path in folder.iterdir():
            if path.name not in (*manifest["files"], MANIFEST):
                path.unlink()
        public = without_paths(run)
        same = {flag: run[flag] for flag, value in manifest["run"].items() if flag in run and value == public[flag]}
        write_bytes(folder / MANIFEST, manifest_bytes({**manifest, "run": {**manifest["run"], **same}}))
        if (temporary / METRICS).exists():  # the lines of the run so far: training.begin takes them from here
            (temporary / METRICS).rename(folder / METRICS)
        sync_folder(folder)
        if final.exists():  # it is not whole, or it would have been taken
            move_aside(final)
        folder.rename(final)
        sync_folder(output_dir)
    except BrokenCheckpoint as error:
        raise UserError(f"{FLAG}: {LAST} of {name} cannot be used: {error}") from None
    except Exception as error:
        if not _is_the_hubs(error):
            raise
        raise UserError(f"{FLAG}: {name}: {one_line(error)}; the same command tries it again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{final.name} comes from {name} at {sha[:8]}"
