"""The flags that are more than a word: read from text once, written as the same text for the same value."""

import dataclasses

import pytest
import yaml

from vit_hf.arguments import RandAugment, RandomCrop, RunArguments, parse, plain
from vit_hf.arguments.values import (
    listed_classes,
    parse_batch_size,
    parse_classes,
    parse_freeze,
    parse_image_size,
    parse_mean,
    parse_overrides,
    parse_std,
    parse_trackers,
    parse_workers,
)
from vit_hf.errors import ArgumentError

LETTERS = tuple(f"layers.{number}" for number in range(6))

# flag, text, value, and the text that stands for the value in a file
READ = [
    ("random_crop", "none", RandomCrop(), "none"),
    ("random_crop", " padding=4", RandomCrop("padding", 4.0), "padding=4"),
    ("random_crop", "scale=0.08", RandomCrop("scale", 0.08), "scale=0.08"),
    ("random_crop", "scale=0.08,rule=torchvision", RandomCrop("scale", 0.08), "scale=0.08"),
    ("random_crop", "scale=5e-2, rule=tensorflow", RandomCrop("scale", 0.05, "tensorflow"), "scale=0.05,rule=tensorflow"),
    ("random_crop", "scale=1", RandomCrop("scale", 1.0), "scale=1"),
    ("random_crop", "simple", RandomCrop("simple", 4.0), "simple"),
    ("randaugment", "none", None, "none"),
    ("randaugment", "magnitude=9 ,num_ops=2", RandAugment(), "num_ops=2,magnitude=9"),
    ("randaugment", "num_ops=1, magnitude=7.5", RandAugment(1, 7.5), "num_ops=1,magnitude=7.5"),
    ("randaugment", "magnitude=10,ops=big_vision", RandAugment(2, 10.0, "big_vision"), "num_ops=2,magnitude=10,ops=big_vision"),
    ("randaugment", "magnitude_std=0.5,increasing=true", RandAugment(2, 9.0, "timm", 0.5), "num_ops=2,magnitude=9,magnitude_std=0.5,increasing=true"),
    ("randaugment", "increasing=true", RandAugment(ops="timm"), "num_ops=2,magnitude=9,magnitude_std=0,increasing=true"),
    ("image_size", "224", 224, "224"),
    ("image_size", "32x48", (32, 48), "32x48"),
    ("image_size", "none", None, None),
    ("image_mean", "0.485, 0.456,0.406", (0.485, 0.456, 0.406), "0.485,0.456,0.406"),
    ("image_mean", "0.50", (0.5, 0.5, 0.5), "0.5"),
    ("image_std", "2", (2.0, 2.0, 2.0), "2"),
    ("dataloader_num_workers", "auto", None, "auto"),
    ("dataloader_num_workers", "04", 4, "4"),
    ("per_device_train_batch_size", "auto", "auto", "auto"),
    ("per_device_train_batch_size", "1e2", 100, 100),
    ("per_device_train_batch_size", "none", None, None),
    ("report_to", "none", (), "none"),
    ("report_to", "wandb, tensorboard", ("wandb", "tensorboard"), "wandb,tensorboard"),
    ("subset_classes", "cat, 3,ship", ("cat", "3", "ship"), "cat,3,ship"),
    ("config_overrides", "pooling=mean,drop_path_rate=1e-1", {"drop_path_rate": 0.1, "pooling": "mean"}, "drop_path_rate=0.1,pooling=mean"),
    ("config_overrides", "stem_depths=[2, 2],fc_norm=true,head_hidden_size=none", {"fc_norm": True, "head_hidden_size": None, "stem_depths": [2, 2]}, "fc_norm=true,head_hidden_size=none,stem_depths=[2,2]"),
    ("config_overrides", "none", {}, None),
    ("change", "learning_rate, --max_steps,learning_rate", ("learning_rate", "max_steps"), "learning_rate,max_steps"),
    ("freeze", "encoder", ("encoder",), "encoder"),
    ("freeze", "layers.0-5, embeddings", ("embeddings", *LETTERS), "embeddings,layers.0-5"),
    ("freeze", "layers.5,layers.0-4", LETTERS, "layers.0-5"),
    ("freeze", "vit.layers.10,vit.layers.9,vit.layers.0.attention", ("vit.layers.9", "vit.layers.10", "vit.layers.0.attention"), "vit.layers.9-10,vit.layers.0.attention"),
    ("freeze", "none", (), None),
    ("license", " apache-2.0", "apache-2.0", "apache-2.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value", "written"), READ, ids=[f"{name} {text}" for name, text, *_ in READ])
def test_a_text_is_one_value_and_the_value_one_text(name, text, value, written, tmp_path):
    args = parse(RunArguments, [f"--{name}", text], prog="x")
    assert getattr(args, name) == value and type(getattr(args, name)) is type(value)
    assert plain(args)[name] == written
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(plain(args)))
    again = parse(RunArguments, ["--config", str(tmp_path / "again.yaml")], prog="x")
    assert again == args and plain(again) == plain(args)


def test_no_value_of_a_run_is_a_text_that_must_be_parsed_where_it_is_used():
    """Every text among the flags is a name, a path or a choice: what is more has its kind, and is read by the parser."""
    flags = [item for item in dataclasses.fields(RunArguments) if not item.metadata["file_only"]]
    given = {item.name for item in flags if item.metadata["kind"] is not None}
    assert given == {name for name, *_ in READ}


@pytest.mark.parametrize(
    "text",
    ["padding", "padding=x", "padding=-1", "scale=0", "scale=1.1", "crop=3", "none=1", "", "scale=0.1,rule=timm"]
    + ["scale=0.1,0.2", "scale=0.1,", "padding=4,", "padding=4,rule=tensorflow", "simple=4", "rule=tensorflow"],
)
def test_random_crop_refuses(text):
    with pytest.raises(ArgumentError, match="--random_crop: .* is not none, padding=PIXELS"):
        parse(RunArguments, [f"--random_crop={text}"], prog="x")


@pytest.mark.parametrize(
    "text",
    ["9", "num_ops=0", "num_ops=9", "magnitude=31", "magnitude=-1", "magnitude=11,ops=big_vision", "ops=timm", "n=2", "num_ops=two", ""]
    + ["magnitude_std=0.5", "increasing=false", "increasing=true,magnitude=11", "increasing=true,magnitude_std=-1"]
    + ["increasing=true,ops=big_vision", "increasing=true,magnitude_std=nan"],
)  # fmt: skip
def test_randaugment_out_of_range_is_refused(text):
    with pytest.raises(ArgumentError, match="--randaugment: .* is not none or e.g."):
        parse(RunArguments, [f"--randaugment={text}"], prog="x")


@pytest.mark.parametrize(
    ("read", "texts", "said"),
    [
        (parse_image_size, ("0", "big", "32x", "1x2x3", "-4", "3.5", ""), "is not SIDE or HEIGHTxWIDTH"),
        (parse_mean, ("0.1,0.2", "a", "", "1.5", "nan", "-0.1"), "is not one number or three by comma, from 0 to 1"),
        (parse_std, ("0", "0.1,0.2,0", "inf", "0.1,0.2,0.3,0.4"), "is not one number or three by comma, above 0"),
        (parse_workers, ("some", "-1", "513", "1.5"), "is not auto or a number from 0 to 512"),
        (parse_batch_size, ("0", "some", "2.5", "inf", "nan", "-8"), "is not auto or a whole number of 1 or more"),
        (parse_trackers, ("mlflow", "wandb,", "wandb,none"), "is not one of tensorboard, wandb, trackio; or give none alone"),
        (parse_classes, (" , ",), "' , ' names no class"),
        (listed_classes, ([], [" "]), "names no class"),
        (parse_overrides, ("pooling", "pooling=", "=mean", "pooling=[mean", 'pooling="mean', "pooling=: :"), "is not NAME=VALUE"),
        (parse_freeze, ("layers.*", "layers.0-", "3", "layers..1", "layers.0-5.mlp"), "is not a part of the model"),
        (parse_freeze, ("layers.5-0", "layers.0-1000"), "is not a range of layers"),
        (parse_freeze, ("", " , "), "names no part of the model"),
    ],
)  # fmt: skip
def test_other_texts_are_refused_with_what_is_allowed(read, texts, said):
    for text in texts:
        with pytest.raises(ValueError) as caught:
            read(text)
        assert said in str(caught.value), text


def test_overrides_have_the_types_of_yaml():
    text = (
        "drop_path_rate=0.1, pooling=mean,head_hidden_size=none,layer_norm_eps=1e-6,qkv_bias=false,num_hidden_layers=3"
    )
    found = parse_overrides(text)
    assert found == {
        "drop_path_rate": 0.1,
        "head_hidden_size": None,
        "layer_norm_eps": 1e-6,
        "num_hidden_layers": 3,
        "pooling": "mean",
        "qkv_bias": False,
    }
    assert [type(value) for value in found.values()] == [float, type(None), float, int, str, bool]
    assert parse_overrides("head_hidden_size=null") == {"head_hidden_size": None} and parse_overrides("") == {}


def test_classes_of_a_file_are_kept_by_name(tmp_path, monkeypatch):
    """run_config.yaml holds the classes, not the file: it means the same where the file is gone or stands for others."""
    file = tmp_path / "classes.txt"
    file.write_text("tench, Tinca tinca\n\n 2 \nship\n")
    args = parse(RunArguments, ["--subset_classes", str(file)], prog="x")
    assert args.subset_classes == ("tench, Tinca tinca", "2", "ship")
    assert plain(args)["subset_classes"] == [
        "tench, Tinca tinca",
        "2",
        "ship",
    ]  # a comma in a name: by comma it is two
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(args)))
    file.unlink()
    assert parse(RunArguments, ["--config", str(tmp_path / "run.yaml")], prog="x") == args
    monkeypatch.chdir(tmp_path)
    cat = parse(RunArguments, ["--subset_classes", "cat"], prog="x")
    (tmp_path / "cat").write_text("dog\n")
    assert plain(cat)["subset_classes"] == ["cat"]
    file.write_bytes(b"\xff")
    with pytest.raises(ArgumentError, match="--subset_classes: .* cannot be read"):
        parse(RunArguments, ["--subset_classes", str(file)], prog="x")


def test_yaml_may_hold_lists_and_mappings(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "randaugment: {num_ops: 2, magnitude: 9, magnitude_std: 0.5, increasing: true}\nimage_mean: [0.1, 0.2, 0.3]\n"
        "image_size: 64\nconfig_overrides: {pooling: mean, stem_depths: [2, 2], fc_norm: true}\nreport_to: [wandb]\n"
        "subset_classes: [3, 'a, b']\nper_device_train_batch_size: 32\ndataloader_num_workers: 2\nimage_std:\n"
    )
    args = parse(RunArguments, ["--config", str(recipe)], prog="x")
    assert args.randaugment == RandAugment(2, 9.0, "timm", 0.5) and args.image_mean == (0.1, 0.2, 0.3)
    assert args.config_overrides == {"fc_norm": True, "pooling": "mean", "stem_depths": [2, 2]}
    assert (args.image_size, args.report_to, args.subset_classes) == (64, ("wandb",), ("3", "a, b"))
    assert (args.per_device_train_batch_size, args.dataloader_num_workers, args.image_std) == (32, 2, None)
