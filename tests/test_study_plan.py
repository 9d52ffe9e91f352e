"""A study file as runs: the grid, the order, and one clear line for what cannot be right."""

import copy

import pytest
import yaml

from tests.runs import ROOT
from vit_hf.errors import ArgumentError
from vit_hf.study.plan import read_study

STUDY = {
    "title": "Test",
    "output_dir": "runs/test",
    "seeds": [0, 7],
    "axes": {"images": {"10": {"subset_per_class": 10}, "all": {}}, "source": {"glyphs": None, "fractal": None}},
    "cells": {  # the first starts from one that comes later
        "{source}-{images}": {"recipe": "recipes/demo/finetune_digits.yaml", "start_from": "pretrain-{source}"},
        "scratch-{images}": {
            "recipe": "recipes/demo/finetune_digits.yaml",
            "script": "run_finetune.py",
            "flags": {"preset": "vit-demo-patch8-32", "config_overrides": {"pooling": "mean"}},
        },
        "pretrain-{source}": {"recipe": "recipes/demo/pretrain_{source}.yaml", "seeds": [7]},
    },
    "questions": [
        {
            "question": "Which?",
            "claim": "The first.",
            "source": "none",
            "x": "images",
            "rows": [{"cell": "{source}-{images}", "label": "after {source}", "quoted": 0.9}],
            "tests": [
                {"greater": "{source}-{images}", "than": "scratch-{images}", "margin": 0.1},
                {"greater": "scratch-all", "than": 0.5},
                {"equal": ["glyphs-all", "fractal-all"], "within": 0.02},
            ],
        }
    ],
}


def written(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(copy.deepcopy(STUDY) | changes, sort_keys=False))
    return path


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_grid_and_order(tmp_path):
    study = read_study(written(tmp_path))
    names = list(dict.fromkeys(cell.name for cell in study.cells))
    assert names == ["pretrain-glyphs", "glyphs-10", "glyphs-all", "pretrain-fractal", "fractal-10", "fractal-all",
                     "scratch-10", "scratch-all"]  # fmt: skip
    done = set()
    for cell in study.cells:
        assert cell.start_from is None or cell.start_from in done
        done.add(cell)


def test_words_of_a_cell(tmp_path):
    cells = {str(cell): cell for cell in read_study(written(tmp_path), tmp_path / "here").cells}
    cell = cells["glyphs-10 seed 0"]
    args = cell.args
    assert (args.seed, args.subset_seed, args.subset_per_class, args.learning_rate) == (0, 0, 10, 1e-3)
    assert args.output_dir == str(tmp_path / "here/glyphs-10/seed-0")
    assert args.model_name_or_path == str(tmp_path / "here/pretrain-glyphs/seed-7")  # pretrained once, for both seeds
    assert cells["glyphs-10 seed 7"].args.model_name_or_path == args.model_name_or_path
    assert (cell.script, cells["pretrain-glyphs seed 7"].script) == ("run_finetune.py", "run_pretrain.py")
    assert cells["scratch-all seed 7"].args.config_overrides == {"pooling": "mean"}
    assert cells["scratch-all seed 7"].args.subset_per_class is None


def test_questions_name_cells(tmp_path):
    (question,) = read_study(written(tmp_path)).questions
    rows = [(row.cell, row.label, row.x, row.quoted) for row in question.rows]
    assert rows == [
        ("glyphs-10", "after glyphs", "10", ""),
        ("glyphs-all", "after glyphs", "all", ""),
        ("fractal-10", "after fractal", "10", ""),
        ("fractal-all", "after fractal", "all", "0.9"),
    ]
    pairs = [(test.greater, test.than, test.margin) for test in question.tests if not test.equal]
    assert pairs[:2] == [("glyphs-10", "scratch-10", 0.1), ("glyphs-all", "scratch-all", 0.1)]
    assert pairs[-1] == ("scratch-all", 0.5, 0.0) and len(pairs) == 5
    assert question.tests[-1].equal == ("glyphs-all", "fractal-all")


CELL = {"recipe": "recipes/demo/pretrain_glyphs.yaml"}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"cell": {}}, "unknown key 'cell' in the study, did you mean 'cells'"),
        ({"cells": {}}, "cells is missing"),
        ({"cells": {"a": []}}, "must hold 'name: value' lines, found list"),
        ({"cells": {"a": CELL | {"recpie": 1}}}, "unknown key 'recpie' in a cell, did you mean 'recipe'"),
        ({"cells": {"a": {}}}, "a: recipe is missing"),
        ({"cells": {"a": {"recipe": "nowhere.yaml"}}}, "a: --config: nowhere.yaml cannot be read"),
        ({"cells": {"a": CELL | {"script": "rm"}}}, "script 'rm' is not one of run_pretrain.py, run_finetune.py"),
        ({"cells": {"a": CELL | {"flags": {"max_step": 3}}}}, "unknown flag --max_step, did you mean 'max_steps'"),
        ({"cells": {"a": CELL | {"flags": {"max_steps": "x"}}}}, "a: --max_steps: 'x' is not a whole number"),
        ({"cells": {"a": CELL | {"flags": {"seed": 3}}}}, "a: seed is the study's to set"),
        ({"cells": {"a": CELL | {"flags": {"model_name_or_path": "x"}, "start_from": "b"}, "b": CELL}},
         "a: model_name_or_path is the study's to set"),
        ({"cells": {"a/b": CELL}}, "the cell 'a/b' is no name for a folder"),
        ({"cells": {"..": CELL}}, "the cell '..' is no name for a folder"),
        ({"cells": {"a-10": CELL, "a-{images}": CELL}}, "the cell 'a-10' stands there twice"),
        ({"cells": {"a-{image}": CELL}}, "no axis 'image', did you mean 'images'"),
        ({"cells": {"a": CELL | {"start_from": "c"}, "b": CELL}}, "a starts from 'c', known: a, b"),
        ({"cells": {"a": CELL | {"start_from": "b"}, "b": CELL | {"start_from": "a"}}}, "a starts from b starts from a: a circle"),
        ({"cells": {"a": CELL | {"start_from": "{images}"}}}, "there is no axis 'images' here"),
        ({"seeds": 3}, "seeds: 3 is not a list of different whole numbers"),
        ({"seeds": []}, "seeds: [] is not a list of different whole numbers"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] is not a list of different whole numbers"),
        ({"cells": {"a": CELL | {"flags": {"max_steps": None}}}}, "a: max_steps has no value"),
        ({"cells": {"a": CELL | {"seeds": [1, 2]}, "b": CELL | {"start_from": "a", "seeds": [1, 3]}}},
         "b has seeds [1, 3], a, which it starts from, [1, 2]; or one for all"),
        ({"axes": {"x": {"1": {"seed": 1}}, "y": {"1": {"momentum": 0.5}}, "z": {"1": {"momentum": 0.9}}},
          "cells": {"a-{y}-{z}": CELL}}, "a-1-1: the axes y and z both set momentum, and one would be lost"),
        ({"axes": 3}, "axes must hold 'name: value' lines, found int"),
        ({"output_dir": ["a"]}, "output_dir: ['a'] is not a text"),
        ({"cells": {"a-{}": CELL}}, "braces hold the name of an axis"),
        ({"cells": {"a-{": CELL}}, "braces hold the name of an axis"),
        ({"axes": {}, "cells": {"a-{x}": CELL}}, "a-{x}: no axis 'x', there are none"),
        ({"questions": [{"tests": [{"greater": "scratch-10", "than": 90}]}]}, "than: 90 is no accuracy"),
        ({"questions": 3}, "questions must be a list, found 3"),
        ({"questions": [{"tests": 3}]}, "tests must be a list, found 3"),
        ({"questions": [{"x": ["images"]}]}, "x: ['images'] is not a text"),
        ({"questions": [{"rows": [{"cell": "{source}-all", "label": "one"}]}]}, "two rows of a question are called 'one'"),
        ({"questions": [{"rows": [{"cell": "scratch-10", "label": "{"}]}]}, "braces hold the name of an axis"),
        ({"questions": [{"tests": [{"equal": ["scratch-10"], "within": 1}]}]}, "takes two or more different cells"),
        ({"questions": [{"tests": [{"equal": ["scratch-10", "scratch-all"], "within": "2%"}]}]}, "within: '2%' is not a number"),
        ({"questions": [{"tests": [{"greater": "scratch-10", "than": "scratch-all", "margin": "ten"}]}]},
         "margin: 'ten' is not a number"),
        ({"questions": [{"rows": [{"cell": "glyphs"}]}]}, "a question asks for the cell 'glyphs', did you mean"),
        ({"questions": [{"rows": [], "x": "flops"}]}, "x: 'flops' is neither forward_flops nor an axis; there are images, source"),
        ({"questions": [{"tests": [{"greater": "scratch-10"}]}]}, "a test is 'greater, than, margin' or 'equal, within'"),
        ({"questions": [{"tests": [{"equal": ["scratch-10", "scratch-1"], "within": 1}]}]}, "the cell 'scratch-1'"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_line(tmp_path, changes, said):
    if "cells" in changes:
        changes = {"questions": []} | changes
    path = written(tmp_path, **changes)
    with pytest.raises(ArgumentError) as caught:
        read_study(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, said", [("a: [", "is not YAML"), ("- a", "must hold 'name: value' lines, found list")]
)
def test_what_is_no_study(tmp_path, content, said):
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=said):
        read_study(path)
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_study_asks_questions_of_its_cells(path):
    study = read_study(path)
    asked = {row.cell for question in study.questions for row in question.rows}
    started_from = {cell.start_from.name for cell in study.cells if cell.start_from}
    assert {cell.name for cell in study.cells} == asked | started_from  # nothing is trained for nothing
    for question in study.questions:
        assert question.claim and question.source and question.tests, question.question
