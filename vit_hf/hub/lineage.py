"""Where a model comes from: what it was trained from, pinned, and on which data; back to the first of the chain.

A run records its chain when it starts, in `resolved:` of run_config.yaml; `trace` follows the folders and repositories
themselves, of which it reads run_config.yaml alone.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging

from vit_hf.arguments import without_paths
from vit_hf.data.sets.names import GENERATED_SETS, HUB_SETS, ImageSplits, resolve_name

RUN_CONFIG, WEIGHTS = "run_config.yaml", "model.safetensors"
LONGEST = 50  # links, so that a chain of copies that never ends does


def parent_of(model: str, revision: str | None) -> dict[str, Any]:
    """The model that a run starts from, pinned: of a Hub id the commit that was loaded, of a folder the SHA-256 of its
    weights; with what its own run_config.yaml says of where it comes from.

    Args:
        model: Hub id or folder, as it was loaded just now. revision: that was asked for.
    """
    if Path(model).is_dir():
        folder = Path(model)
        weights = folder / WEIGHTS
        found = {"name": folder.resolve().name, "sha256": sha256_of(weights) if weights.is_file() else None}
        told = _local_config(folder)
    else:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(config).as_posix()) if isinstance(config, str) else None
        found = {"name": model, "revision": commit[1] if commit else revision}
        told = _cached_config(model, found["revision"])
    return {**found, **_record_of(told)} if told else found


def _cached_config(model: str, revision: str | None) -> dict[str, Any] | None:
    """run_config.yaml of a repository; None where it cannot be had: a run does not fail for it."""
    try:
        return _read(Path(hf_hub_download(model, RUN_CONFIG, revision=revision)))
    except Exception:  # of network, Hub and disk alike
        return None


def _record_of(told: dict[str, Any]) -> dict[str, Any]:
    flags, resolved = told, told.get("resolved") or {}
    found = {"data": data_of(without_paths(flags), resolved)}
    if flags.get("preset"):
        found["preset"] = flags["preset"]
    if flags.get("model_name_or_path"):
        name = without_paths(flags)["model_name_or_path"]
        found["parent"] = resolved.get("parent") or {"name": name, "revision": flags.get("revision")}
    return found


def data_of(flags: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    """What a run was trained on: set, split and revision, and the rule and hash of a subset."""
    subset = resolved.get("subset") or {}
    found = {
        "dataset_name": flags.get("dataset_name"), "dataset_config_name": flags.get("dataset_config_name"),
        "revision": resolved.get("dataset_revision"), "split": resolved.get("train_split"),
        "samples": resolved.get("train_samples"), "subset_rule": subset.get("rule"),
        "subset_hash": resolved.get("subset_hash"),
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def dataset_revision(splits: ImageSplits) -> str | None:
    """The commit of the Hub that the images come from: the name of their folder in the cache of `datasets`, or a part of
    the addresses of a stream's shards. None where they do not come from there."""
    for split in (splits.train, splits.eval):
        for address in getattr(split, "files", ()):  # hf://datasets/NAME@COMMIT/PATH
            if found := re.match("hf://datasets/[^@]+@([0-9a-f]{40})/", str(address)):
                return found[1]
    for source in splits.sources.values():
        if source.name[0] in GENERATED_SETS or (source.name[0] and resolve_name(source.name[0])[1]):
            continue
        names = [Path(file["filename"]).parent.name for file in source.images.cache_files]
        if found := next((name for name in names if re.fullmatch("[0-9a-f]{40}", name)), None):
            return found
    return None


def recorded_chain(flags: dict[str, Any], resolved: dict[str, Any]) -> list[dict[str, Any]]:
    """The chain as a run recorded it: its own data first, then each model before it."""
    if not flags:
        return []
    links = [{"data": data_of(without_paths(flags), resolved), "preset": flags.get("preset")}]
    parent = resolved.get("parent")
    if parent is None and flags.get("model_name_or_path"):
        parent = {"name": without_paths(flags)["model_name_or_path"], "revision": flags.get("revision")}
    while parent and len(links) < LONGEST:
        links.append({key: value for key, value in parent.items() if key != "parent"})
        parent = parent.get("parent")
    return links


def link_lines(links: list[dict[str, Any]]) -> list[str]:
    """One line for each link of a recorded chain."""
    lines = []
    for place, link in enumerate(links):
        name = "this model" if place == 0 else f"`{link['name']}`{_pin(link)}"
        data = f" was trained on {_data(link['data'])}" if link.get("data") else ": nothing is known of its data"
        start = f", from random weights ({link['preset']})" if link.get("preset") else ""
        if place + 1 < len(links):
            start = f", from `{links[place + 1]['name']}`{_pin(links[place + 1])}"
        lines.append(name + data + start)
    return lines


def trace(model: str, revision: str | None = None) -> tuple[list[str], bool]:
    """The chain of a Hub id or folder, one line a link, as `vit-hf lineage` prints it.

    Returns:
        the lines, the last of which says where the chain ends and why; and whether the model itself could be read.
    """
    lines: list[str] = []
    seen: set[str] = set()
    here: dict[str, Any] = {"name": model, "revision": revision}
    recorded: dict[str, Any] | None = None
    for _ in range(LONGEST):
        key, told, note = _open(here)
        prefix = "<- " if lines else ""
        if key in seen:
            return [*lines, f"{prefix}{here['name']}: ends here, the chain comes back to it (a cycle)"], True
        seen.add(key)
        if told is None and recorded is not None and (recorded.get("data") or recorded.get("parent")):
            rest = [f"<- {line}" for line in _recorded_lines(recorded)]
            return [*lines, f"{prefix}{here['name']}{_pin(here)}: {note}; its child recorded:", *rest], True
        if told is None:
            found = bool(lines) or "converted" in note
            return [*lines, f"{prefix}{here['name']}{_pin(here)}: ends here, {note}"], found
        resolved = told.get("resolved") or {}
        lines.append(f"{prefix}{here['name']}{_pin(here)}{f' ({note})' if note else ''}")
        lines.append(f"   trained on {_data(data_of(told, resolved))}")
        if not told.get("model_name_or_path"):
            return [*lines, f"   from random weights ({told.get('preset')}): the chain ends here"], True
        recorded = resolved.get("parent")
        pinned = resolved.get("parent_revision") or told.get("revision")
        here = {"name": told["model_name_or_path"], "revision": pinned, "pinned": "parent_revision" in resolved}
    return [*lines, f"... the chain is longer than {LONGEST} links"], True


def _recorded_lines(link: dict[str, Any]) -> list[str]:
    found: list[str] = []
    here: dict[str, Any] | None = link
    while here and len(found) < LONGEST:
        data = f" trained on {_data(here['data'])}" if here.get("data") else ", of whose data nothing is known"
        start = f", from random weights ({here['preset']})" if here.get("preset") else ""
        found.append(f"{here['name']}{_pin(here)}{data}{start}")
        here = here.get("parent")
    return found


def _open(link: dict[str, Any]) -> tuple[str, dict[str, Any] | None, str]:
    """A link's identity, its run_config.yaml or None, and a note: why there is none, or what is wrong with it."""
    name, revision = str(link["name"]), link.get("revision")
    folder = Path(name)
    if folder.is_dir():
        told = _local_config(folder)
        key = str(folder.resolve())
        if told is None:
            made = _read(folder / "conversion.json")
            what = (
                f"it was converted from {made['source']} ({made['format']}, sha256 {made['sha256']})" if made else ""
            )
            return key, None, what or f"the folder has no {RUN_CONFIG}"
        note = ""
        if revision and revision.startswith("sha256:") and (folder / WEIGHTS).is_file():
            if sha256_of(folder / WEIGHTS) != revision.removeprefix("sha256:"):
                note = "its weights have changed since; what follows is of the folder as it is now"
        return key, told, note
    key = f"{name}@{revision}"
    if (revision or "").startswith("sha256:") or name.startswith(("/", ".", "~")):
        return key, None, "the folder is not here"
    try:
        logging.set_verbosity_error()  # of its retries; the reason that is left is told in a line of ours
        path = Path(hf_hub_download(name, RUN_CONFIG, revision=revision))
    except (
        Exception
    ) as error:  # each fault of the Hub, the network or the name is an end of the chain, with its reason
        return key, None, _why(error)
    told = _read(path)
    return key, told, "" if told is not None else f"its {RUN_CONFIG} cannot be read"


def _why(error: Exception) -> str:
    if isinstance(error, LocalEntryNotFoundError):  # an EntryNotFoundError too
        return "the Hub cannot be reached, and the cache does not have it"
    if isinstance(error, EntryNotFoundError):
        return f"it has no {RUN_CONFIG}: it was not trained with vit_hf"
    if isinstance(error, GatedRepoError):
        return "it is gated, and you have no access"
    if isinstance(error, RevisionNotFoundError):
        return "that revision is gone"
    if isinstance(error, RepositoryNotFoundError):
        return "it is private or gone, or no such repository ever was"
    if isinstance(error, HFValidationError):
        return "it is neither a folder here nor a Hub id"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"the Hub answered {error.response.status_code}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _local_config(folder: Path) -> dict[str, Any] | None:
    """run_config.yaml of a folder; of a checkpoint that of its run."""
    return _read(folder / RUN_CONFIG) or (
        _read(folder.resolve().parent / RUN_CONFIG) if (folder / "manifest.json").is_file() else None
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pin(link: dict[str, Any]) -> str:
    pin = link.get("revision") or (f"sha256:{link['sha256']}" if link.get("sha256") else None)
    return f"@{pin[:19] if pin.startswith('sha256:') else pin[:12]}" if pin else ""


def _data(data: dict[str, Any]) -> str:
    name = str(data.get("dataset_name", "?"))
    name = HUB_SETS.get(name, name)
    told = name + (f" ({data['dataset_config_name']})" if data.get("dataset_config_name") else "")
    if data.get("revision"):
        told += f"@{data['revision'][:12]}"
    elif name in GENERATED_SETS:
        told += " (made on the machine)"
    else:
        told += " (revision not recorded)"
    parts = [str(data["split"])] if data.get("split") else []
    parts += [f"{data['samples']} images"] if data.get("samples") else []
    if rule := data.get("subset_rule"):
        parts.append(
            "subset " + (" ".join(f"{k}={v}" for k, v in rule.items()) if isinstance(rule, dict) else str(rule))
        )
    parts += [f"sha256 {data['subset_hash']}"] if data.get("subset_hash") else []
    return ", ".join([told, *parts])
