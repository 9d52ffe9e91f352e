"""`vit-hf push`: a folder to the Hub, later than its run or without one."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vit_hf.arguments import parse
from vit_hf.arguments.fields import flag
from vit_hf.errors import UserError


@dataclass
class PushArguments:
    """What is sent, and where."""

    folder: str = flag("", "folder of a run, a checkpoint, or another model's folder")
    hub_model_id: str | None = flag(None, "repository to push to (default: the name of the folder)")
    hub_revision: str | None = flag(None, "branch to push to, made where it is missing (default: main)")
    hub_strategy: Literal["end", "checkpoint"] = flag(
        "end", "checkpoint: the run's newest checkpoint goes to last-checkpoint/ too, for --resume_from_checkpoint hub"
    )
    private: bool = flag(False, "create the repository as private")
    dry_run: bool = flag(False, "say what would be sent, and ask the Hub nothing")


def main(argv: list[str]) -> None:
    """Uploads a model's folder to the Hub, in one commit."""
    args = parse(PushArguments, argv, prog="vit-hf push", description=main.__doc__, positional="folder")
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name that of a run, of a checkpoint, or of another model")
    from vit_hf.hub.content import newest_checkpoint
    from vit_hf.hub.push import find_repository, folder_commit, push_command, send_folder
    from vit_hf.hub.uploader import Patience, Target, Uploader, open_api
    from vit_hf.training.tracking import warn

    if not (folder / "config.json").exists() and (newest := newest_checkpoint(folder)) is not None:
        print(f"{folder} has no finished model: {newest.name} is sent")
        folder = newest
    with_state = args.hub_strategy == "checkpoint"
    named = folder.resolve()
    name = args.hub_model_id or (named.parent if re.fullmatch(r"checkpoint-\d+", named.name) else named).name
    message, files = folder_commit(folder, with_state, name)
    if args.dry_run:
        for path, content in files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>14,} bytes  {path}")
        print(f'dry run: {len(files)} files would go to {name} ({args.hub_revision or "main"}) as "{message}"')
        return

    def tell(event: str, commit: object, *, why: str = "", seconds: float | None = None, **_) -> None:
        if event == "upload_failed" and seconds is not None:
            warn(f"{why}; it is tried again in {seconds:g} s")

    api, patience = open_api(), Patience()
    name, _ = find_repository(api, name)
    uploader = Uploader(api, Target(name, args.private, args.hub_revision), tell, patience)
    later = push_command(folder, name, args.hub_revision, args.private, args.hub_strategy)
    print(f"pushed to {send_folder(uploader, folder, with_state, patience, f'try again: hf auth login && {later}')}")
