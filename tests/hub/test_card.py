"""The card of a run, of a checkpoint and of a converted folder; `vit-hf verify`; `vit-hf lineage`."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

from tests.hub.hub_server import HubServer
from tests.runs import DEMO_DEFAULTS, ROOT, in_process, python
from vit_hf.arguments import RunArguments, read_config
from vit_hf.cli import dispatch
from vit_hf.errors import ArgumentError, UserError
from vit_hf.hub.card import card_text, refresh_card
from vit_hf.hub.lineage import sha256_of, trace

RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretrained model on two thirds of the digits and one fine-tuned from it, with a recipe's promises."""
    folder = tmp_path_factory.mktemp("card")
    flags = DEMO_DEFAULTS | {"max_steps": 4, "save_steps": 2}
    in_process("pretrain", **flags, subset_fraction=0.5, output_dir=folder / "parent")
    promise = {
        "metric": "eval_accuracy",
        "value": 0.0,
        "tolerance": 0.01,
        "seeds": [0],
        "source": "a test",
        "measured": True,
    }
    target = {"metric": "eval_accuracy", "value": 0.999, "source": "a paper", "measured": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"expected": [promise, target]}))
    flags |= {"preset": None, "config_overrides": None, "model_name_or_path": folder / "parent"}
    flags |= {"license": "apache-2.0", "carbon_intensity": 380, "power_watts": 250, "config": folder / "recipe.yaml"}
    in_process(
        "finetune", **{key: value for key, value in flags.items() if value is not None}, output_dir=folder / "child"
    )
    return folder


def test_the_card_has_the_hub_s_metadata_and_what_a_reader_asks(runs):
    child, results = runs / "child", json.loads((runs / "child/all_results.json").read_text())
    data = metadata_load(child / "README.md")
    assert (
        data["license"] == "apache-2.0" and "language" not in data and data["pipeline_tag"] == "image-classification"
    )
    hours = results["wall_time_seconds"] / 3600
    assert data["co2_eq_emissions"]["emissions"] == pytest.approx(0.25 * hours * 380, rel=1e-3)
    assert data["co2_eq_emissions"]["training_type"] == "fine-tuning"
    card = ModelCard.load(child / "README.md")
    (accuracy, *_) = card.data.eval_results
    assert (accuracy.dataset_name, accuracy.dataset_split, accuracy.metric_type) == ("digits", "test", "accuracy")
    assert accuracy.metric_value == results["eval_accuracy"]
    for part in ("## Limits", "closed (10: 0, 1", "a target, quoted and not measured", "## Use", "hours", "CO2: "):
        assert part in card.text, part
    assert str(runs) not in card.text and "base_model" not in data  # the parent is a folder of this machine
    assert sha256_of(runs / "parent/model.safetensors")[:12] in card.text
    parent = (runs / "parent/README.md").read_text()
    assert "license" not in metadata_load(runs / "parent/README.md") and "co2_eq_emissions" not in parent
    resolved = yaml.safe_load((runs / "parent/run_config.yaml").read_text())["resolved"]
    assert resolved["subset_hash"] in parent and "subset fraction=0.5 seed=0, sha256 " in parent


def test_lines_of_the_card_run(runs, tmp_path, monkeypatch, capsys):
    """Both Python blocks and the command, as they stand there but for the place."""
    Image.new("RGB", (40, 30), (90, 20, 200)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    text = (runs / "child/README.md").read_text().replace("PATH/TO/child", str(runs / "child"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0].replace('classify("image.png")', 'answer = classify("image.png")'), names)
    try:
        exec(blocks[1], names)
    except ImportError as error:  # transformers 5.17 has no AutoImageProcessor without torchvision
        pytest.skip(f"the second block: {' '.join(str(error).split())[:80]}")
    assert capsys.readouterr().out.strip().splitlines()[-1] == names["answer"][0]["label"]
    (command,) = re.findall(r"```bash\n(vit-hf .*)\n```", text)
    dispatch([*command.split()[1:], "--output_dir", "."])
    again = json.loads((tmp_path / "eval_results.json").read_text())
    one = again["sets"][0] if "sets" in again else again
    assert one["eval_accuracy"] == json.loads((runs / "child/all_results.json").read_text())["eval_accuracy"]


def test_a_checkpoint_s_card_has_the_numbers_of_its_step(runs):
    text = card_text(runs / "child/checkpoint-2", "me/child")
    assert "as it was after step 2 of 4" in text and '"me/child"' in text and "those of step 2;" in text
    assert text == card_text(runs / "child/checkpoint-2", "me/child", run=runs / "child")


def test_later_evaluations_come_into_the_card_and_a_changed_card_stays(runs, tmp_path):
    shutil.copytree(runs / "child", tmp_path / "child", ignore=shutil.ignore_patterns("checkpoint-*"))
    later = {"dataset_name": "imagenet-v2", "hub_id": "a/v2", "eval_split": "test", "revision": "0123456789abcdef" * 2,
             "eval_accuracy": 0.5, "eval_loss": 1.0, "eval_samples": 10}  # fmt: skip
    (tmp_path / "child/eval_results.json").write_text(json.dumps({"sets": [later]}))
    assert refresh_card(tmp_path / "child", "me/child")
    found = ModelCard.load(tmp_path / "child/README.md").data.eval_results
    (one,) = [result for result in found if result.dataset_name == "imagenet-v2"]
    several = {"dataset_name": "birds", "eval_split": "test", "eval_map": 0.25, "eval_f1_micro": 0.5, "eval_loss": 0.1, "eval_samples": 9,
               "average_precision": {"a": 0.25}}  # fmt: skip
    (tmp_path / "child/eval_results.json").write_text(json.dumps({"sets": [later, several]}))
    assert refresh_card(tmp_path / "child")
    listed = ModelCard.load(tmp_path / "child/README.md").data.eval_results
    assert ("birds", "mean_average_precision", 0.25) in [
        (r.dataset_name, r.metric_type, r.metric_value) for r in listed
    ]
    assert {"digits", "imagenet-v2", "birds"} == {r.dataset_name for r in listed}
    assert (one.dataset_type, one.dataset_revision, one.metric_value) == ("a/v2", later["revision"], 0.5)
    with (tmp_path / "child/README.md").open("a") as file:
        file.write("My notes.")
    assert not refresh_card(tmp_path / "child") and "My notes." in (tmp_path / "child/README.md").read_text()


def test_a_full_evaluation_of_the_run_s_own_split_completes_its_row(runs, tmp_path):
    folder = tmp_path / "child"
    shutil.copytree(runs / "child", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    own = json.loads((folder / "all_results.json").read_text())
    dispatch(["evaluate", str(folder), "--dataset_name", "digits", "--max_eval_samples", "60"])
    dispatch(["evaluate", str(folder), "--dataset_name", "digits", "--max_eval_samples", "101", "--full"])
    whole = json.loads((folder / "eval_results.json").read_text())
    lines = (folder / "README.md").read_text().splitlines()
    rows = {line.split("|")[3].strip(): line for line in lines if line.startswith("| digits | test |")}
    assert len(rows) == sum(line.startswith("| digits | test |") for line in lines), "a row is there twice"
    low, high = whole["eval_accuracy_interval"]
    assert f"| {own['eval_accuracy']:.4f} ({low:.4f} to {high:.4f}) |" in rows[str(own["eval_samples"])]
    assert f"{whole['eval_brier']:.4f} (" in rows[str(own["eval_samples"])]
    assert set(rows) <= {"60", "101"}


def test_a_converted_folder_has_a_card(runs, tmp_path):
    dispatch(["convert", str(runs / "child"), str(tmp_path / "timm"), "--to", "timm"])
    text = (tmp_path / "timm/README.md").read_text()
    assert sha256_of(runs / "child/model.safetensors") in text and "timm.create_model(" in text and "`child`" in text
    assert metadata_load(tmp_path / "timm/README.md")["library_name"] == "timm"
    lines, found = trace(str(tmp_path / "timm"))
    assert found and "converted from child" in lines[-1]


def test_verify_compares_and_ends_with_1_on_a_miss(runs, tmp_path, capsys):
    shutil.copytree(runs / "child", tmp_path / "child", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(UserError, match="the target is 0.9990"):
        dispatch(["verify", str(tmp_path / "child")])
    shown = capsys.readouterr().out
    assert "never measured by us" in shown and "target missed" in shown
    verified = json.loads((tmp_path / "child/verified.json").read_text())
    assert [row["status"] for row in verified["results"]] == ["met", "target missed"] and not verified["met"]
    assert "| target missed |" in (tmp_path / "child/README.md").read_text()
    recipe = tmp_path / "other.yaml"
    entry = {"metric": "eval_loss", "value": 100.0, "source": "a test", "measured": True, "flags": {"preset": None}}
    recipe.write_text(yaml.safe_dump({"expected": [entry]}))
    dispatch(["verify", str(tmp_path / "child"), "--recipe", str(recipe)])  # a loss that is lower is better
    recipe.write_text(yaml.safe_dump({"expected": [entry | {"metric": "eval_map"}]}))
    with pytest.raises(UserError, match="eval_map was not measured"):
        dispatch(["verify", str(tmp_path / "child"), "--recipe", str(recipe)])
    recipe.write_text(
        yaml.safe_dump({"expected": [entry | {"flags": {"learning_rate": "1e-3", "global_batch_size": "32"}}]})
    )
    dispatch(["verify", str(tmp_path / "child"), "--recipe", str(recipe)])  # the same values in other words
    recipe.write_text(yaml.safe_dump({"expected": [entry | {"flags": {"leraning_rate": 1}}]}))
    with pytest.raises(UserError, match="'leraning_rate' is no flag"):
        dispatch(["verify", str(tmp_path / "child"), "--recipe", str(recipe)])
    recipe.write_text(yaml.safe_dump({"expected": [entry | {"flags": {"preset": "vit-tiny"}}]}))
    with pytest.raises(UserError, match="only for preset: vit-tiny"):
        dispatch(["verify", str(tmp_path / "child"), "--recipe", str(recipe)])


def test_a_promise_is_held_against_its_own_set_and_one_pass(runs, tmp_path):
    """Numbers of another set, or of two passes an image, are not what was promised."""
    shutil.copytree(runs / "child", tmp_path / "child", ignore=shutil.ignore_patterns("checkpoint-*"))
    recipe, later = tmp_path / "recipe.yaml", tmp_path / "child/eval_results.json"
    promise = {"metric": "eval_macro_f1", "value": 0.5, "source": "a test", "measured": True}
    recipe.write_text(yaml.safe_dump({"expected": [promise]}))
    for one in ({"dataset_name": "cifar10"}, {"dataset_name": "digits", "tta": "flip"}):
        later.write_text(json.dumps({"sets": [one | {"eval_macro_f1": 0.9}]}))
        with pytest.raises(UserError, match="eval_macro_f1 was not measured"):
            dispatch(["verify", str(tmp_path / "child"), "--recipe", str(recipe)])
    later.write_text(json.dumps({"sets": [{"dataset_name": "digits", "eval_macro_f1": 0.9}]}))
    dispatch(["verify", str(tmp_path / "child"), "--recipe", str(recipe)])
    later.write_text("[")
    with pytest.raises(UserError, match="is no finished run"):
        dispatch(["verify", str(tmp_path / "child"), "--recipe", str(recipe)])


@pytest.mark.parametrize(
    "entry, told",
    [({"metrc": "x"}, "unknown key 'metrc'"), ({"metric": "x", "value": 1, "source": "y"}, "measured is missing"),
     ({"metric": "x", "value": "high", "source": "y", "measured": True}, "value: 'high' is not a number")],
)  # fmt: skip
def test_a_promise_that_is_none_is_one_line(entry, told, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"expected": [entry]}))
    with pytest.raises(ArgumentError, match=told):
        read_config(tmp_path / "recipe.yaml", RunArguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_promises_what_its_header_says(recipe):
    """A quoted number stands in the header too; a measured one in the block alone, with its seeds."""
    header = "\n".join(line for line in recipe.read_text().splitlines() if line.startswith("#"))
    for one in read_config(recipe, RunArguments).get("expected", ()):
        assert one.metric == "eval_accuracy" and 0 < one.value < 1
        if one.measured:
            assert len(one.seeds) >= 3 and one.tolerance > 0 and f"{one.value:.4f}" not in header
        else:
            assert re.search(rf"\b{100 * one.value:g}\b", header), one


def test_lineage_goes_back_to_the_data(runs, tmp_path, capsys):
    dispatch(["lineage", str(runs / "child")])
    shown = capsys.readouterr().out
    resolved = yaml.safe_load((runs / "child/run_config.yaml").read_text())["resolved"]
    assert resolved["parent_revision"] == "sha256:" + sha256_of(runs / "parent/model.safetensors")
    assert resolved["parent_revision"][:19] in shown and resolved["parent"]["data"]["subset_hash"] in shown
    assert "subset fraction=0.5 seed=0" in shown and shown.strip().endswith("the chain ends here")
    shutil.copytree(runs / "child", tmp_path / "child", ignore=shutil.ignore_patterns("checkpoint-*"))
    told = yaml.safe_load((tmp_path / "child/run_config.yaml").read_text())
    told["model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "child/run_config.yaml").write_text(yaml.safe_dump(told))
    lines, _ = trace(str(tmp_path / "child"))
    assert "not here; its child recorded" in lines[2] and resolved["parent"]["data"]["subset_hash"] in lines[3]
    told |= {"model_name_or_path": str(tmp_path / "child"), "resolved": {}}
    (tmp_path / "child/run_config.yaml").write_text(yaml.safe_dump(told))
    lines, _ = trace(str(tmp_path / "child"))
    assert "a cycle" in lines[-1]
    with pytest.raises(UserError, match="no run_config.yaml"):
        dispatch(["lineage", str(tmp_path)])


@pytest.mark.slow
def test_lineage_on_the_hub_pins_commits_and_says_why_it_ends(runs, tmp_path):
    """A model fine-tuned from a repository names the commit that was loaded, also after the repository has moved on."""
    with HubServer(tokens={"hf_test": "tester"}) as hub:
        files = {path.name: path.read_bytes() for path in (runs / "parent").iterdir() if path.is_file()}
        hub.add_repo("model", "tester/parent", files)
        hub.add_repo("model", "tester/bare", {"config.json": files["config.json"]})
        flags = {key: value for key, value in DEMO_DEFAULTS.items() if key not in ("preset", "config_overrides")}
        words = [word for name, value in (flags | {"max_steps": 2, "model_name_or_path": "tester/parent",
                 "output_dir": tmp_path / "child"}).items() for word in (f"--{name}", str(value))]  # fmt: skip
        environment = hub.env(home=tmp_path)
        environment["HF_HUB_OFFLINE"] = "0"
        done = python(ROOT / "run_finetune.py", *words, env=environment)
        assert done.returncode == 0, done.stderr
        resolved = yaml.safe_load((tmp_path / "child/run_config.yaml").read_text())["resolved"]
        assert re.fullmatch("[0-9a-f]{40}", resolved["parent_revision"])
        assert metadata_load(tmp_path / "child/README.md")["base_model"] == "tester/parent"
        code = "import sys; from vit_hf.hub.lineage import trace; [print('\\n'.join(trace(name)[0])) for name in sys.argv[1:]]"
        done = python("-c", code, tmp_path / "child", "tester/none", "tester/bare", env=environment)
        assert done.returncode == 0, done.stderr
        assert (
            f"tester/parent@{resolved['parent_revision'][:12]}" in done.stdout and "the chain ends here" in done.stdout
        )
        assert "tester/none: ends here, it is private or gone" in done.stdout
        assert "tester/bare: ends here, it has no run_config.yaml" in done.stdout
