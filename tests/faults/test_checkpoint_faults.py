"""Checkpoints that are damaged, and disks that are full: a clear line each time, and nothing is lost."""

import copy
import json
import random
import shutil
import subprocess
import sys

import pytest

from tests.runs import DEMO_DEFAULTS, ROOT, in_process, lines, words
from vit_hf.errors import UserError
from vit_hf.training.manifest import find, read_manifest, seal

JUNK = [
    None, True, False, -1, 0, 1, 1.5, 1e300, 10**30, "", "x", "checkpoint-2", "../../x", "/etc/passwd", "a\0b", "\ud800",
    "é" * 300, [], [1], {}, {"": None}, {"bytes": 1}, {"bytes": -1, "sha256": "0" * 64}, {"bytes": 1.0, "sha256": 7},
    {"bytes": True, "sha256": "0" * 64}, float("nan"), float("inf"),
]  # fmt: skip
NAMES = ["..", "../manifest.json", "/etc/passwd", "", ".", "a/../../b", "a\\b", "./model.safetensors", "a\0", "\udfff", "x" * 400,
         "training_state-00001-of-99999.safetensors", "training_state-00002-of-00001.safetensors"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    in_process("pretrain", **{**DEMO_DEFAULTS, "output_dir": folder, "max_steps": 2, "save_steps": 1})
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(trained / name, tmp_path / "run" / name)
    return tmp_path / "run"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def places(value, above=()):
    """Every (container, key) below a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(pairs):
        yield value, key
        yield from places(below)


def mutated(text, rng):
    """A manifest with one thing wrong with it, as bytes; half of them with the SHA-256 that fits."""
    kind = rng.choice(["value", "value", "value", "drop", "rename", "file", "file", "text", "bytes", "nest"])
    content = json.loads(text)
    if kind == "text":
        return text[: rng.randrange(len(text))].encode()
    if kind == "bytes":
        broken = bytearray(text.encode())
        for _ in range(rng.randrange(1, 5)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken)
    if kind == "nest":
        return b"[" * rng.choice([10, 100_000]) + text.encode()
    if kind == "file":
        files = content["files"]
        name = rng.choice(sorted(files))
        files[rng.choice(NAMES)] = files.pop(name) if rng.random() < 0.5 else copy.copy(files[name])
    else:
        top = [
            (content, key) for key in content if key not in ("run", "exactness", "versions")
        ]  # free in what they hold
        container, key = rng.choice(top + list(places(content["files"])))
        if kind == "value":
            wrong = [junk for junk in JUNK if repr(junk) != repr(container[key])]
            container[key] = rng.choice(wrong)
        elif kind == "drop":
            del container[key]
        else:
            container[rng.choice(["x", "", str(key) + " ", str(key).upper()])] = container.pop(key)
    return json.dumps(seal(content) if rng.random() < 0.5 else content).encode()


def outcome(folder, resume_from):
    """(the step found, why not the newest): whatever the reason, it is one line."""
    try:
        chosen, manifest, passed_over = find(folder, resume_from)
    except UserError as error:
        return None, str(error)
    return manifest["step"], passed_over.get(str(folder / "checkpoint-2"))


def test_a_hundred_malformed_manifests(folder):
    """Each is passed over with a reason (or refused, where it looks like another version's), and nothing is deleted."""
    path = folder / "checkpoint-2/manifest.json"
    text = path.read_text()
    whole, reasons, accepted = json.loads(text), [], []
    for seed in range(100):
        path.write_bytes(mutated(text, random.Random(seed)))
        before = contents(folder)
        for resume_from in ("auto", str(folder / "checkpoint-2")):
            found, why = outcome(folder, resume_from)
            if found == 2:  # nothing that a resume reads was changed but what may have such a value
                accepted.append(seed)
                continue
            assert why and "\n" not in why and len(why) < 1000 and why.isprintable(), (seed, why)
            assert found == (1 if resume_from == "auto" and "cannot be used" not in why else None), (seed, why)
            reasons.append(why)
        assert contents(folder) == before
    assert len(set(reasons)) > 40 and len(set(accepted)) <= 10, (len(set(reasons)), accepted)
    for seed in set(accepted):  # another valid number with a seal that fits it, as a person would write it
        path.write_bytes(mutated(text, random.Random(seed)))
        found = read_manifest(path.parent)
        assert {name for name in found if found[name] != whole.get(name)} - {"sha256"} <= {
            "wall_time_seconds", "optimizer_steps", "scaler", "partition", "total_steps", "changed", "x", "",
            "partition ", "PARTITION", "total_steps ", "TOTAL_STEPS", "changed ", "CHANGED",
        }, seed  # fmt: skip


def test_one_flipped_bit_in_each_file_in_turn(folder):
    """Each is seen before anything is loaded, and named; the checkpoint before it is taken."""
    rng = random.Random(0)
    names = sorted(path.name for path in (folder / "checkpoint-2").iterdir())
    assert len(names) >= 5
    for name in names:
        path = folder / "checkpoint-2" / name
        content = path.read_bytes()
        for _ in range(10):
            broken = bytearray(content)
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            found, why = outcome(folder, "auto")
            assert found in (1, None) and (name in why or "wrote it in" in why), (name, found, why)
            assert path.read_bytes() == broken
        path.write_bytes(content)
    assert outcome(folder, "auto") == (2, None)


def may_mount():
    return (
        sys.platform == "linux"
        and not subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not may_mount(), reason="this machine allows no mounts; the quick tests fail a write in its middle"
)
def test_a_disk_that_fills_in_the_middle_of_a_save(tmp_path):
    """Two processes, room for three checkpoints and a half: the fourth and those after it are left out, training goes on
    to its end, and the export fits. Then two old ones are removed, and the same command goes on from the newest."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    flags = {**DEMO_DEFAULTS, "output_dir": disk / "run", "save_steps": 1, "save_total_limit": 9, "eval_steps": 6}
    run = f"""
        mount -t tmpfs -o size=1200k tmpfs {disk} && cd {ROOT} &&
        {sys.executable} -m accelerate.commands.launch --config_file accelerate_configs/cpu_2proc.yaml run_pretrain.py \
            {" ".join(words(flags))}; status=$?; cp -r {disk}/run {kept}; exit $status
    """
    result = subprocess.run(["unshare", "-m", "sh", "-c", run], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line["step"] for line in lines(kept)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in kept.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert find(kept, "auto")[0].name == "checkpoint-3"
    events = [json.loads(line) for line in (kept / "events.jsonl").read_text().splitlines()]
    failed = [event for event in events if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == [4, 5, 6]
    assert all("No space left on device" in event["why"] for event in failed)
    assert "warning: checkpoint-4 could not be written: No space left on device" in result.stderr
    assert "without checkpoint-6" in result.stdout + result.stderr and "Traceback" not in result.stderr
    assert (kept / "model.safetensors").exists()
