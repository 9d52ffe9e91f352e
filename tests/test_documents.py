"""Every recipe, every launcher config and every documented command parses, and names things that exist."""

import re
import shlex

import pytest
import yaml

from tests.runs import ROOT
from vit_hf.arguments import RunArguments, check, parse
from vit_hf.arguments.values import parse_overrides
from vit_hf.commands.bench import BenchArguments
from vit_hf.commands.compare import CompareArguments
from vit_hf.commands.data import CacheArguments, PrepareArguments, ShowArguments
from vit_hf.commands.evaluate import EvaluateArguments
from vit_hf.commands.figures import FiguresArguments
from vit_hf.commands.lineage import LineageArguments
from vit_hf.commands.predict import PredictArguments
from vit_hf.commands.probe import ProbeArguments
from vit_hf.commands.push import PushArguments
from vit_hf.commands.space import SpaceArguments
from vit_hf.commands.study import chosen, parse_words
from vit_hf.commands.verify import VerifyArguments
from vit_hf.models.presets import preset_config
from vit_hf.study.execute import Launcher
from vit_hf.study.plan import read_study

RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
STUDY_PAGES = [ROOT / "docs/study.md", ROOT / "docs/study.zh-CN.md"]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(ROOT.glob("docs/*.md"))]


def commands():
    """(page, words) of every shell command in the pages and in the recipes' headers."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield pytest.param(shlex.split(line, comments=True), id=f"{page.name}: {line[:60]}")
    for recipe in RECIPES:
        (command,) = re.findall(r"^#   command   (.*(?:\n#             --.*)*)", recipe.read_text(), re.M)
        yield pytest.param(shlex.split(command.replace("\n#", " ")), id=f"{recipe.name}: command")


def check_run(words):
    args = parse(RunArguments, words, prog="run")
    if "--model_name_or_path" not in words and args.preset is None:
        args.model_name_or_path = "given by a flag"
    check(args)
    if args.preset is not None:
        preset_config(args.preset, args.config_overrides)


def check_study(words):
    """A study's words; that its file can be read and has what --only names, where the file is one of ours."""
    args = parse_words(words)
    Launcher(ROOT / args.config_file, args.jobs, tuple(args.devices.split(",")) if args.devices else ())
    if args.study.parts[0] == "studies":
        assert chosen(read_study(args.study).cells, args.only)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_parses_and_says_where_it_comes_from(recipe):
    check_run(["--config", str(recipe)])
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    told = {line.split()[1] for line in header if len(line.split()) > 1}
    assert {"cost", "command"} <= told
    assert "demo" in recipe.parts or {"source", "expected", "measured"} <= told
    forbidden = {"mixed_precision", "num_processes"}  # the launcher's business
    assert not forbidden & yaml.safe_load(recipe.read_text()).keys()


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_launcher_config_names_files_that_exist_and_no_hyper_parameter(config):
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(config))
    content = yaml.safe_load(config.read_text())
    nested = content.get("deepspeed_config", {})
    if nested:
        assert (ROOT / nested["deepspeed_config_file"]).exists()
    assert not {"gradient_clipping", "gradient_accumulation_steps", "learning_rate"} & {*content, *nested}


@pytest.mark.parametrize("words", list(commands()))
def test_documented_command(words):
    while "=" in words[0] and not words[0].startswith("-"):  # VARIABLE=value command
        words = words[1:]
    for path in [word for word in words if re.match(r"(accelerate_configs|recipes|ds_configs|studies)/", word)]:
        assert (ROOT / path).exists(), path
    scripts = [place for place, word in enumerate(words) if word in ("run_pretrain.py", "run_finetune.py")]
    if scripts:
        if words[scripts[0] + 1 :]:
            check_run(words[scripts[0] + 1 :])
        assert words[0] in ("accelerate", "python"), words
    elif words[:2] == ["vit-hf", "bench"]:
        for name in parse(BenchArguments, words[2:], prog="bench", positional="models").models:
            assert name.startswith("runs/") or preset_config(name)
    elif "probe" in words:
        parse(ProbeArguments, words[words.index("probe") + 1 :], prog="probe", positional="model")
    elif words[:2] == ["vit-hf", "compare"]:
        assert parse(CompareArguments, words[2:], prog="compare", positional=("first", "second")).output_dir
    elif "evaluate" in words:
        parse(EvaluateArguments, words[words.index("evaluate") + 1 :], prog="evaluate", positional="model")
    elif words[0] == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in words[1:])
    elif words[:3] == ["vit-hf", "data", "prepare"]:
        parse(PrepareArguments, words[3:], prog="prepare")
    elif words[:2] == ["vit-hf", "figures"]:
        assert parse(FiguresArguments, words[2:], prog="figures", positional="model").output_dir
    elif words[:2] == ["vit-hf", "predict"]:
        assert parse(PredictArguments, words[2:], prog="predict", positional=("model", "images")).images
    elif words[:3] == ["vit-hf", "data", "show"]:
        parse(ShowArguments, words[3:], prog="show")
    elif words[:3] == ["vit-hf", "data", "cache"]:
        parse(CacheArguments, words[3:], prog="cache")
    elif words[:3] == ["vit-hf", "data", "bench"]:
        parse(RunArguments, words[3:], prog="bench")
    elif words[:2] == ["vit-hf", "push"]:
        assert parse(PushArguments, words[2:], prog="push", positional="folder").folder
    elif words[:2] == ["vit-hf", "report"]:
        assert len(words) > 2 and {word for word in words if word.startswith("--")} <= {"--output_dir"}
    elif words[:2] == ["vit-hf", "models"]:
        changes = parse_overrides(words[4]) if words[3:4] == ["--config_overrides"] else {}
        assert len(words) == 5 if changes else len(words) <= 3
        assert all(preset_config(name, changes) for name in words[2:3])
    elif words[:2] == ["vit-hf", "study"]:
        check_study(words[2:])
    elif words[:2] in (["vit-hf", "lineage"], ["vit-hf", "verify"]):
        cls, positional = (LineageArguments, "model") if words[1] == "lineage" else (VerifyArguments, "run")
        parse(cls, words[2:], prog=words[1], positional=positional)
    elif words[:2] == ["vit-hf", "space"]:
        assert parse(SpaceArguments, words[2:], prog="space", positional="model").output_dir
    elif words[:2] == ["vit-hf", "convert"]:
        assert len(words) == 4 or words[4:] == ["--to", "timm"]
    else:
        assert words[0] in (
            "git",
            "cd",
            "pip",
            "python3",
            "source",
            "hf",
            "tensorboard",
            "kill",
            "pkill",
            "ssh",
            ".",
        ), words


def test_flags_in_the_docs_exist():
    classes = (
        CacheArguments,
        CompareArguments,
        RunArguments,
        EvaluateArguments,
        FiguresArguments,
        PredictArguments,
        PrepareArguments,
        PushArguments,
        ShowArguments,
    )
    classes += (BenchArguments, ProbeArguments)
    classes += (LineageArguments, SpaceArguments, VerifyArguments)
    known = {f"--{name}" for cls in classes for name in cls.__dataclass_fields__} | {"--config"}
    launcher = {"--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip",
                "--main_process_port", "--mixed_precision", "--index-url", "--shm-size", "--to", "--local-dir", "--output", "--stems", "--table", "--help", "--logdir", "--figures", "--include", "--quiet", "--only", "--jobs", "--devices", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal", "--requeue"}  # fmt: skip
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()):
            assert flag in known | launcher, f"{page.name}: {flag}"


def test_no_placeholder_is_left_and_every_linked_file_exists():
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"DEMO_TABLE|TODO|TBD|XXX", text), page.name
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_the_listing_of_presets_is_the_commands(capsys):
    """`vit-hf models` as docs/models.md shows it, line by line."""
    from vit_hf.cli import dispatch

    page = (ROOT / "docs/models.md").read_text()
    dispatch(["models"])
    (block,) = re.findall(r"```console\n\$ vit-hf models\n(.*?)```", page, re.S)
    assert block.strip().splitlines() == capsys.readouterr().out.strip().splitlines()


def test_the_table_of_fields_has_every_field():
    from vit_hf.models.configuration_vit import own_fields

    page = (ROOT / "docs/models.md").read_text()
    for item in own_fields():
        assert f"| `{item.name}` |" in page, item.name


@pytest.mark.parametrize("page", STUDY_PAGES, ids=lambda page: page.name)
def test_lines_of_the_equations_stand_in_the_file_that_is_named(page):
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    path, found = None, 0
    for line in block.splitlines():
        if line.startswith("#"):
            path = ROOT / "vit_hf/models" / re.search(r"\w+\.py", line)[0]
        else:
            assert line in path.read_text(), f"{path.name}: {line}"
            found += 1
    assert found > 10


def test_the_study_pages_have_the_same_commands_and_the_example_is_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = [re.findall(r"```(bash|yaml)\n(.*?)```", page.read_text(), re.S) for page in STUDY_PAGES]
    commands, translated = ([re.sub(r"  #.*", "", text) for _, text in page] for page in blocks)
    assert commands == translated
    (example,) = (text for kind, text in blocks[0] if kind == "yaml")
    (tmp_path / "example.yaml").write_text(example)
    study = read_study(tmp_path / "example.yaml")
    assert len(study.cells) == 15 and len(study.questions[0].tests) == 3


def test_what_the_demo_recipes_promise_stands_in_the_readme():
    for recipe in ROOT.glob("recipes/demo/*.yaml"):
        for entry in yaml.safe_load(recipe.read_text()).get("expected", []):
            for page in ("README.md", "README.zh-CN.md"):
                assert f"{entry['value']:.4f}" in (ROOT / page).read_text(), f"{page}: {recipe.name}"


def test_numbers_of_the_study_are_those_of_its_report():
    """Each `mean ± interval` of the pages stands in the committed report, and each count of verdicts in English."""
    report = (ROOT / "studies/results/paper_on_digits/report.md").read_text()
    found = 0
    for page in PAGES:
        for number in re.findall(r"0\.\d{4} ± 0\.\d{4}", page.read_text()):
            assert number in report, f"{page.name}: {number}"
            found += 1
        for count in re.findall(r'": (\d+ of \d+ supported[^|]*?) \|', page.read_text()):
            assert f"| {count} " in report, f"{page.name}: {count}"
    assert found > 60
