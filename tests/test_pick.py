"""Flags find their rooms: `pick` fills settings by name, so a name that fits no flag would silently keep its default."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

from tests.runs import ROOT
from vit_hf.arguments import RunArguments, pick
from vit_hf.arguments.fields import CardArguments, default_of

FLAGS = {item.name: item for item in dataclasses.fields(RunArguments)}
# what a room needs beside flags, and is handed by name
NO_FLAGS = {
    "SetSettings": {"need_train", "only_judged"},
    "JudgeSettings": {"class_names", "multi_label", "source", "source_rows"},
    "LoopSettings": {"start_time", "first_step", "training_flops_per_image"},
}
RESOLVED = {("JudgeSettings", "loss")}  # the flag has `auto`, the room is handed what it means


def settings_classes():
    for path in sorted((ROOT / "vit_hf").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Settings"):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                yield pytest.param(module, node.name, id=node.name)


@pytest.mark.parametrize(("module", "name"), list(settings_classes()))
def test_each_field_of_settings_is_a_flag_of_the_same_default(module, name):
    """A command has fewer flags than a run: what it does not have keeps the settings' default, which has to be the run's.
    No command trains; what a command fits by itself has its own flags."""
    fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    flags = flags_of_command(module) if module.startswith("vit_hf.commands") else FLAGS
    assert {item.name for item in fields} - flags.keys() == NO_FLAGS.get(name, set())
    for item in fields:
        has_default = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        known = item.name in flags and (name, item.name) not in RESOLVED
        if known and has_default and not module.startswith("vit_hf.training"):
            assert default_of(item) == default_of(flags[item.name]), item.name


def flags_of_command(module):
    classes = vars(importlib.import_module(module)).items()
    (arguments,) = [found for name, found in classes if name.endswith("Arguments") and found.__module__ == module]
    return {item.name: item for item in dataclasses.fields(arguments)}


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_finetune.py"])
def test_each_flag_is_read_on_the_page(script):
    """By itself (`args.seed`), or by the settings that are picked; but what only the card tells, which reads it in
    run_config.yaml."""
    told, read = {item.name for item in dataclasses.fields(CardArguments)}, set()
    card = (ROOT / "vit_hf/hub/card.py").read_text()
    assert all(f'get("{name}")' in card for name in told)
    tree = ast.parse((ROOT / script).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
            read.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pick":
            room, settings = node.args[0].value.id, node.args[0].attr
            found = getattr(importlib.import_module(f"vit_hf.{room}"), settings)
            read |= {item.name for item in dataclasses.fields(found)} - {word.arg for word in node.keywords}
    assert FLAGS.keys() - read == told


def test_pick_takes_flags_by_name_and_what_is_given_instead():
    @dataclasses.dataclass
    class Settings:
        seed: int
        momentum: float
        folder: Path = Path("here")

    found = pick(Settings, RunArguments(seed=3, momentum=0.5), momentum=0.25)
    assert found == Settings(3, 0.25, Path("here"))
