"""What stands beside the files of a copy: the summary, the dataset card, the checksums."""

import json
import sys
from pathlib import Path
from typing import Any

from vit_hf.data.copy.plan import Shard
from vit_hf.data.copy.shard import read_footer, write_text
from vit_hf.errors import UserError


def summarise(shards: list[Shard]) -> dict[str, dict[str, int]]:
    summary: dict[str, dict[str, int]] = {}
    for shard in shards:
        footer = read_footer(shard)
        total = summary.setdefault(shard.split, {"rows": 0, "shards": 0, "bytes": 0, "skipped": 0})
        for name, value in (
            ("rows", footer["rows"]), ("shards", 1), ("bytes", footer["bytes"]), ("skipped", len(footer["bad"])),
        ):  # fmt: skip
            total[name] += value
    return summary


def describe_copy(output_dir: Path, content: dict[str, Any], shards: list[Shard], digests: list[str]) -> None:
    """Writes what stands beside the parquet files; the checksums last, which say that the copy is finished.

    Raises:
        UserError: a split has no row left.
    """
    summary = summarise(shards)
    for split, total in summary.items():
        if total["rows"] == 0:
            raise UserError(f"{split} split: none of its {total['skipped']} images decodes; look at --dataset_name")
    splits = list(summary)
    bad = [row for shard in shards for row in read_footer(shard)["bad"]]
    bad.sort(key=lambda row: (splits.index(row["split"]), row["row"]))
    if bad:
        write_text(output_dir / "bad_images.jsonl", "".join(f"{json.dumps(row)}\n" for row in bad))
        print(f"warning: {len(bad)} images are left out: {output_dir / 'bad_images.jsonl'}", file=sys.stderr)
    write_text(output_dir / "README.md", _card(content, summary))
    lines = [f"{digest}  data/{shard.path.name}\n" for shard, digest in zip(shards, digests)]
    write_text(output_dir / "checksums.sha256", "".join(lines))


def _card(content: dict[str, Any], summary: dict[str, dict[str, int]]) -> str:
    """The dataset card. Without sizes in its front matter: the parquet files say them, and the classes, themselves."""
    source, side, versions = content["source"], content["shorter_side"], content["versions"]
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in summary)
    splits = "".join(
        f"| {split} | {content['splits'][split]['source']} | {total['rows']:,} | {total['skipped']:,} "
        f"| {total['shards']} | {megabytes(total['bytes'])} |\n"
        for split, total in summary.items()
    )
    subset = source.get("subset") or {}
    rows = "All rows of the training split"
    if subset:
        rule, digest = json.dumps(subset["rule"]), subset["subset_hash"]
        rows = f"A subset of the training split, `{rule}` with the hash `{digest}`"
    if any(total["skipped"] for total in summary.values()):
        rows += ", without the images that do not decode, which bad_images.jsonl lists"
    rows += f"; in a random order (seed {content['row_order_seed']}). The other split has the order of the source.\n"
    others = {name: value for name, value in source.items() if name not in ("dataset_name", "subset") and value}
    if others:
        rows += "\n" + "".join(f"- {name}: `{value}`\n" for name, value in others.items())
    return f"""---
configs:
- config_name: default
  data_files:
{files}task_categories:
- image-classification
---

# {source["dataset_name"].removeprefix("./")}, shorter side {side}

A copy of {_link(source["dataset_name"])} for image classification with {content["classes"]["number"]:,} classes,
in which the shorter side of an image has at most {side} pixels. Larger images were resized (bicubic, aspect kept)
and written as JPEG of quality {content["jpeg_quality"]} with 4:2:0 chroma, upright, in RGB and without metadata;
all others have their original bytes.

| split | of the source | rows | left out | files | size |
|---|---|---|---|---|---|
{splits}
{rows}
Beside `image` and `label`, `source_row` is the number of the row in the split of the source, and `source_sha256` the
SHA-256 of its image there, so that a subset can be chosen alike from the source and from the copy.

The terms of use are those of the source. Written by vit_hf {versions["vit_hf"]} with Pillow {versions["pillow"]};
`sha256sum -c checksums.sha256` checks the files.
"""


def _link(name: str) -> str:
    from vit_hf.data.sets.names import GENERATED_SETS, HUB_SETS

    if name.startswith("./"):
        return f"the folder `{name[2:]}`"
    if name in GENERATED_SETS:
        return f"the generated set `{name}`"
    path = HUB_SETS.get(name, name)
    return f"[{path}](https://huggingface.co/datasets/{path})"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
