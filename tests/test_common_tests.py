"""transformers' own tests of a model (ModelTesterMixin of its source package) on every family of ours.

They are in no installed package: `pip download` fetches the source of the installed version, once, into the user's cache.
tests/common_models.py says which models, and which tests have another form; it runs in a process of its own.
"""

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

from tests.downloads import once
from tests.runs import ROOT, python

pytestmark = pytest.mark.slow
VITS = ["Stock", "MeanSincos", "Registers", "Relative", "MapConv", "Hybrid"]
FAMILIES = [*VITS, "ResNetCifar", "Bit"]
# imported by the tests for exporters and for models that generate text; their files are not in the source package
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def pip(*words):
    """Runs pip; skips where it cannot fetch."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        pytest.skip(
            f"pip {words[0]} fetches no transformers=={transformers.__version__}: {done.stderr.strip()[-300:]}"
        )


@pytest.fixture(scope="module")
def fetched():
    """A folder with the tests of the installed transformers as the package `transformers_tests`."""
    return once(f"transformers-{transformers.__version__}", fetch)


def fetch(whole):
    """The tests out of the source package, and the stand-ins."""
    with tempfile.TemporaryDirectory() as scratch:
        name = f"transformers=={transformers.__version__}"
        pip("download", "--no-binary", "transformers", "--no-deps", "--dest", scratch, name)
        package = whole / "transformers_tests"
        package.mkdir()
        (archive,) = Path(scratch).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar:
                if Path(member.name).match("transformers-*/tests/*.py"):
                    (package / Path(member.name).name).write_bytes(tar.extractfile(member).read())
        for path, text in STAND_INS.items():
            (package / path).parent.mkdir(exist_ok=True)
            (package / path).parent.joinpath("__init__.py").touch()
            (package / path).write_text(text)
        (package / "__init__.py").touch()
        if importlib.util.find_spec("parameterized") is None:
            pip("install", "--no-deps", "--target", str(whole), "parameterized==0.9.0")


@pytest.fixture(scope="module")
def outcomes(fetched, tmp_path_factory):
    """{family: {test: "passed", or "failed: why", or "skipped: why"}}"""
    report = tmp_path_factory.mktemp("common") / "report.xml"
    done = python(
        "-m", "pytest", "--override-ini=addopts=", "-p", "no:cacheprovider", "-q", f"--junitxml={report}",
        "tests/common_models.py", env={"PYTHONPATH": f"{ROOT}:{fetched}"},
    )  # fmt: skip
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        state = "passed"
        for kind in ("skipped", "error", "failure"):  # the worst is the last
            for child in case.findall(kind):
                state = f"{'skipped' if kind == 'skipped' else 'failed'}: {child.get('message')}"
        tests = found.setdefault(case.get("classname").split(".")[-1].removesuffix("Test"), {})
        # a test of several parts has a case for each part that failed
        if not tests.get(case.get("name"), "").startswith("failed"):
            tests[case.get("name")] = state
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_tests_of_a_model_pass(outcomes, family):
    """None fails, and those that matter are among the ones that ran."""
    tests = outcomes[family]
    assert {name: state for name, state in tests.items() if state.startswith("failed")} == {}
    passed = {name for name, state in tests.items() if state == "passed"}
    assert len(passed) >= 40
    assert passed >= {
        "test_save_load", "test_problem_types", "test_training",
        "test_hidden_states_output", "test_model_outputs_equivalence", "test_can_be_initialized_on_meta",
        "test_load_with_mismatched_shapes",
    }  # fmt: skip
    if family in VITS:
        assert passed >= {
            "test_attention_outputs",
            "test_model_get_set_embeddings",
            "test_config_attn_implementation_setter",
        }


def test_every_family_is_run(outcomes):
    assert set(outcomes) == set(FAMILIES)
