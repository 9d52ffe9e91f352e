"""The one-way rule of imports (DESIGN, section 1), read from the source, and how much a script loads before it works."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A file imports from its own folder and from the lines above it; neighbours on a line do not know each other.
LEVELS = [
    {"errors", "front", "progress"},
    {"arguments"},
    {"models", "data", "training", "evaluation"},
    {"analysis"},
    {"hub", "study"},
    {"commands", "run_pretrain", "run_finetune"},
    {"cli"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FILES = sorted((ROOT / "vit_hf").rglob("*.py")) + sorted(ROOT.glob("run_*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Every module and name that a file imports, at any depth of its code, with relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if is_package else -1]
            package = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """vit_hf.data.decode.open_image -> data; run_pretrain -> run_pretrain; vit_hf.__version__ -> ''."""
    parts = module.split(".")
    if parts[0] != "vit_hf":
        return parts[0]
    return parts[1] if len(parts) > 1 and parts[1] != "__version__" else ""


def breaches(module: str, imported: set[str]) -> list[str]:
    own, found = room_of(module), []
    for name in sorted(imported):
        room = room_of(name)
        if name.split(".")[0] not in ("vit_hf", "run_pretrain", "run_finetune") or room in ("", own):
            continue
        if LEVEL.get(room, 99) >= LEVEL[own]:  # 99: a room without a level, or a name of the package itself
            found.append(f"{module} imports {name}")
    return found


def test_every_room_has_its_level():
    assert {room_of(module_of(path)) for path in FILES} - {""} <= set(LEVEL)
    assert len(FILES) > 25


def test_imports_run_one_way():
    found = []
    for path in FILES:
        module = module_of(path)
        if module != "vit_hf":  # its __init__ offers the models' names, lazily
            imported = imported_modules(path.read_text(), module, path.name == "__init__.py")
            found += breaches(module, imported)
    assert found == []


def test_the_rule_sees_what_it_should():
    """Absolute, relative, lazy and `from package import` forms."""
    source = "def f():\n    from ..data import device\nimport vit_hf.cli\nfrom vit_hf import __version__, training\n"
    found = breaches("vit_hf.evaluation.evaluate", imported_modules(source, "vit_hf.evaluation.evaluate", False))
    assert found == [
        "vit_hf.evaluation.evaluate imports vit_hf.cli",
        "vit_hf.evaluation.evaluate imports vit_hf.data.device",
        "vit_hf.evaluation.evaluate imports vit_hf.training",
    ]
    source = "from .hub.push import push\nfrom vit_hf.arguments import UserError\nfrom vit_hf.data.decode import x\n"
    assert breaches("vit_hf.cli", imported_modules(source, "vit_hf.cli", False)) == []


def test_training_knows_no_flags():
    """It is handed values: its files import nothing of the package but the errors."""
    for path in sorted((ROOT / "vit_hf/training").glob("*.py")):
        imported = imported_modules(path.read_text(), module_of(path), path.name == "__init__.py")
        rooms = {room_of(name) for name in imported if name.split(".")[0] == "vit_hf"}
        assert rooms <= {"", "errors", "front", "progress", "training"}, f"{path.name}: {rooms}"


def test_no_function_of_a_room_takes_all_flags():
    """Scripts, commands and the arguments themselves have `args`; a room is handed what it needs."""
    above = [ROOT / "vit_hf/arguments", ROOT / "vit_hf/commands"]
    found = []
    for path in sorted((ROOT / "vit_hf").rglob("*.py")):
        if any(folder in path.parents for folder in above):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                found += [f"{path.relative_to(ROOT)}:{node.lineno}" for one in given if one.arg == "args"]
    assert found == []


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_finetune.py"])
def test_a_script_reads_as_a_page(script):
    """About seventy lines, without a function to be called back: `main` and the course of the run."""
    tree = ast.parse((ROOT / script).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    comments = [line.strip().startswith("#") or not line.strip() for line in (ROOT / script).read_text().splitlines()]
    for node in functions:
        lines = node.end_lineno - node.lineno + 1 - sum(comments[node.lineno - 1 : node.end_lineno])
        assert lines <= 68, f"{node.name}: {lines} lines"
    assert [node.name for node in functions][0] == "main" and len(functions) == 2


def test_the_fronts_of_the_folders_hold_what_they_offer():
    """Each name is there, and none is that of a module, which would be found in its place."""
    code = """
import importlib, pathlib, re
for folder in ("analysis", "data", "evaluation", "hub", "training"):
    package = importlib.import_module("vit_hf." + folder)
    path = pathlib.Path(package.__file__)
    names = " ".join(re.findall(r'": "([^"]+)"', path.read_text())).split()
    assert names and not set(names) & {other.stem for other in path.parent.iterdir()}, folder
    assert all(callable(getattr(package, name)) for name in names)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_architecture_names_files_that_are_there():
    text = (ROOT / "docs/architecture.md").read_text()
    for name in sorted(set(re.findall(r"`(\w+/[\w/]+\.py)`", text)) - {"tests/test_imports.py"}):
        assert (ROOT / "vit_hf" / name).exists(), name
    for path in sorted((ROOT / "vit_hf/training").glob("[a-z]*.py")):
        assert f"`{path.name}`" in text or f"training/{path.name}`" in text, path.name


def test_models_import_nothing_else_of_the_package_and_relatively():
    """The Hub copies files of this folder as the code of a repository."""
    for path in sorted((ROOT / "vit_hf/models").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} reaches out of its folder"
                assert node.level == 1 or not node.module.startswith("vit_hf"), path.name
            elif isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name.startswith("vit_hf")], path.name


COPIED = ("configuration_vit", "stems", "positions", "layers", "modeling_vit", "saving", "baselines")


@pytest.mark.parametrize("name", [f"{name}.py" for name in COPIED])
def test_code_that_is_copied_to_the_hub_needs_torch_and_transformers_alone(name):
    path = ROOT / "vit_hf/models" / name
    imported = imported_modules(path.read_text(), f"vit_hf.models.{path.stem}", False)
    others = {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names)
    assert others <= {
        "torch",
        "transformers",
        "huggingface_hub",
        "vit_hf",
    }  # transformers needs huggingface_hub itself


HEAVY = ("torch", "transformers", "accelerate", "datasets", "evaluate", "sklearn", "pandas", "matplotlib")


def test_arguments_load_nothing_heavy():
    assert_light("import vit_hf.arguments")


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_finetune.py"])
def test_help_of_a_script_loads_nothing_heavy(script):
    words = f"sys.argv = ['{script}', '--help']"
    assert "--learning_rate" in assert_light(f"import runpy; {words}; runpy.run_path('{script}', run_name='__main__')")


@pytest.mark.parametrize(
    "words, shown",
    [([], "evaluate MODEL"), (["evaluate"], "--dataset_name"), (["figures"], "--images"), (["report"], "runs")],
)
def test_help_of_the_command_loads_nothing_heavy(words, shown):
    argv = ["vit-hf", *words, "--help"]
    assert shown in assert_light(f"import vit_hf.cli; sys.argv = {argv}; vit_hf.cli.main()")


def assert_light(code: str) -> str:
    """Runs the code in a process of its own, holds that it loaded none of HEAVY, and returns what it printed."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code\n"
    script += f"loaded = [name for name in {HEAVY} if name in sys.modules]\nassert not loaded, loaded\nprint('LIGHT')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("LIGHT\n"), done.stderr
    return done.stdout
