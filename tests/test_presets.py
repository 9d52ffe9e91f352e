"""Architectures by name, and models built from them or from weights."""

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

from vit_hf.models import ViTConfig, ViTForImageClassification
from vit_hf.models.layers import resize_position_embeddings
from vit_hf.models.presets import (
    PRESETS,
    for_new_labels,
    from_preset,
    load_pretrained,
    parse_overrides,
    preset_config,
)

TINY = dict(
    image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
POSITIONS = "vit.embeddings.position_embeddings"


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tiny_model(**changes) -> ViTForImageClassification:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**{**TINY, "num_labels": 5, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def encoder_differences(model, other) -> set[str]:
    """The encoder's tensors that are missing on one side or not equal to the bit."""
    first, second = ({k: v for k, v in m.state_dict().items() if k.startswith("vit.")} for m in (model, other))
    equal = {k for k in first.keys() & second.keys() if torch.equal(first[k], second[k])}
    return (first.keys() | second.keys()) - equal


# --- names and fields ---


@pytest.mark.parametrize(
    "preset, num_labels, millions", [("vit-base-patch16-224", 1000, 86.57), ("vit-small-patch4-32", 10, 10.7)]
)
def test_parameter_counts(preset, num_labels, millions):
    with torch.device("meta"):
        model = ViTForImageClassification(preset_config(preset, num_labels=num_labels))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_vit_base_has_the_counts_written_out():
    """Table 1 of the ViT paper says 86 M; here to the parameter, with the formula of each part."""
    width, mlp, tokens = 768, 3072, 197
    layer = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    expected = 12 * layer + tokens * width + width + (3 * 16 * 16 + 1) * width + 2 * width + (width + 1) * 1000
    with torch.device("meta"):
        model = ViTForImageClassification(preset_config("vit-base-patch16-224", num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == expected == 86_567_656


def test_presets_are_stock_and_take_changes():
    for name in PRESETS:
        assert preset_config(name).is_stock
    config = preset_config("vit-demo-patch8-32", num_hidden_layers=2, pooling="mean")
    assert (config.num_hidden_layers, config.pooling, config.is_stock) == (2, "mean", False)
    assert config.hidden_size == PRESETS["vit-demo-patch8-32"]["hidden_size"]


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(ValueError, match="vit-base-patch16-224"):
        preset_config("vit-base-patch16-244")
    with pytest.raises(ValueError, match=", ".join(PRESETS)):  # nothing is near: all are listed
        preset_config("resnet")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 30}, "image_size 30 is not divisible by patch_size 8"),
        ({"image_size": [32, 36]}, "image_size 36 is not divisible by patch_size 8"),
        ({"image_size": 4, "patch_size": 8}, "image_size 4"),
        ({"hidden_size": 130}, "hidden_size 130 is not divisible by num_attention_heads 4"),
        ({"pooling": "max"}, "'max' is not one of cls, mean"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: 1.0 is out of range"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob: -0.1 is out of range"),
        ({"head_hidden_size": 0}, "head_hidden_size: 0"),
    ],
)
def test_wrong_fields_are_named_with_their_value(changes, message):
    with pytest.raises(ValueError, match=message):
        preset_config("vit-demo-patch8-32", **changes)


def test_overrides_have_the_types_of_yaml():
    text = (
        "drop_path_rate=0.1, pooling=mean,head_hidden_size=none,layer_norm_eps=1e-6,qkv_bias=false,num_hidden_layers=3"
    )
    found = parse_overrides(text)
    assert found == {
        "drop_path_rate": 0.1,
        "pooling": "mean",
        "head_hidden_size": None,
        "layer_norm_eps": 1e-6,
        "qkv_bias": False,
        "num_hidden_layers": 3,
    }
    assert [type(value) for value in found.values()] == [float, str, type(None), float, bool, int]
    assert parse_overrides("head_hidden_size=null") == {"head_hidden_size": None}
    assert parse_overrides(None) == parse_overrides("") == {}


def test_unknown_or_malformed_override_is_refused():
    with pytest.raises(ValueError, match="'drop_path' is no field of ViTConfig, nearest: drop_path_rate"):
        parse_overrides("pooling=mean,drop_path=0.1")
    with pytest.raises(ValueError, match="'num_labels'"):  # belongs to the data, not to the architecture
        parse_overrides("num_labels=3")
    for text in ("pooling", "pooling=", "=mean"):
        with pytest.raises(ValueError):
            parse_overrides(text)


def test_from_preset_names_the_classes():
    changes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = from_preset("vit-demo-patch8-32", ["a", "b", "c"], changes)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert model.classifier.weight.shape == (3, 16)
    scale = model.config.initializer_range
    assert model.vit.embeddings.position_embeddings.std().item() == pytest.approx(scale, rel=0.2)
    assert model.vit.layers[0].mlp.fc1.weight.std().item() == pytest.approx(scale, rel=0.2)
    assert not model.vit.layers[0].mlp.fc1.bias.any()


# --- other labels on the same encoder ---


def test_new_labels_get_a_zero_head_on_the_same_encoder():
    model = tiny_model(head_hidden_size=8)
    tuned = for_new_labels(model, ["a", "b", "c"], {})
    assert encoder_differences(model, tuned) == set()
    assert tuned.config.head_hidden_size is None and tuned.config.is_stock
    assert tuned.config.id2label == {0: "a", 1: "b", 2: "c"} and tuned.num_labels == 3
    assert tuned.classifier.weight.shape == (3, 16)
    assert not tuned.classifier.weight.any() and not tuned.classifier.bias.any()
    assert model.config.head_hidden_size == 8 and model.config.num_labels == 5  # the given model stays as it is
    with torch.no_grad():  # and is not tied to the new one
        tuned.vit.embeddings.cls_token.zero_()
    assert model.vit.embeddings.cls_token.any()


@pytest.mark.parametrize("image_size, grid", [(24, (6, 6)), ([16, 24], (4, 6)), (8, (2, 2))])
def test_another_image_size_resizes_the_positions_alone(image_size, grid):
    model = tiny_model()
    tuned = for_new_labels(model, ["a", "b"], {"image_size": image_size})
    assert encoder_differences(model, tuned) == {POSITIONS}
    expected = resize_position_embeddings(model.state_dict()[POSITIONS], (4, 4), grid)
    assert torch.equal(tuned.state_dict()[POSITIONS], expected)
    height, width = (4 * side for side in grid)
    assert tuned(torch.zeros(1, 3, height, width)).logits.shape == (1, 2)


def test_mean_pooling_drops_the_class_token_and_its_position():
    model = tiny_model()
    tuned = for_new_labels(model, ["a", "b"], {"pooling": "mean"})
    assert encoder_differences(model, tuned) == {POSITIONS, "vit.embeddings.cls_token"}
    assert torch.equal(tuned.state_dict()[POSITIONS], model.state_dict()[POSITIONS][:, 1:])


def test_kept_head_gives_the_same_logits():
    model = tiny_model(head_hidden_size=8)
    names = list(model.config.id2label.values())
    kept = for_new_labels(model, names, {"drop_path_rate": 0.1}, keep_head=True).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(kept(pixel_values).logits, model(pixel_values).logits)
    assert kept.config.drop_path_rate == 0.1


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 64}, {"patch_size": 8}]
)
def test_another_encoder_is_refused(changes):
    with pytest.raises(ValueError, match="--config_overrides makes another encoder"):
        for_new_labels(tiny_model(), ["a", "b"], changes)


def test_a_model_of_another_kind_is_refused():
    """One that load_pretrained returned as transformers' own class."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    with pytest.raises(ValueError, match="resnet"):
        for_new_labels(transformers.ResNetForImageClassification(config), ["a", "b"], {})


def test_a_class_token_cannot_be_made_up():
    with pytest.raises(ValueError, match="--config_overrides makes another encoder"):
        for_new_labels(tiny_model(pooling="mean"), ["a", "b"], {"pooling": "cls"})


# --- weights from a folder ---


@pytest.mark.parametrize("changes", [{}, {"pooling": "mean", "head_hidden_size": 8}])
def test_load_pretrained_gives_our_class_with_the_same_weights(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert type(loaded) is ViTForImageClassification
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_saved_in_bf16_are_loaded_in_fp32(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_pretrained(str(tmp_path)).parameters()} == {torch.float32}


STORED = "vit.encoder.layer.1.intermediate.dense.weight"  # in memory: vit.layers.1.mlp.fc1.weight


def rewritten(folder, change) -> str:
    tiny_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_missing_tensor_is_named(tmp_path):
    folder = rewritten(tmp_path, lambda tensors: tensors.pop(STORED))
    with pytest.raises(ValueError, match=r"do not fit its config.json: missing vit\.layers\.1\.mlp\.fc1\.weight$"):
        load_pretrained(folder)


@pytest.mark.parametrize("key, name", [(STORED, "vit.layers.1.mlp.fc1.weight"), ("classifier.weight",) * 2])
def test_misshaped_tensor_is_named(tmp_path, key, name):
    folder = rewritten(tmp_path, lambda tensors: tensors.update({key: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=f"do not fit its config.json: misshaped {name}$"):
        load_pretrained(folder)


def test_missing_head_is_allowed(tmp_path):
    """As in a folder that holds an encoder alone."""

    def drop_head(tensors):
        for name in ("classifier.weight", "classifier.bias"):
            del tensors[name]

    loaded = load_pretrained(rewritten(tmp_path, drop_head))
    assert encoder_differences(loaded, tiny_model()) == set()


def test_truncated_file_is_an_error(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(safetensors.SafetensorError):
        load_pretrained(str(tmp_path))


def test_folder_that_does_not_exist_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError):
        load_pretrained(str(tmp_path / "nowhere"))


def test_forward_flops_agree_with_the_papers_table_and_with_a_count():
    """ViT-B/16 at 224: 17.6 GMACs (35.1 GFLOP); a small one against torch's own counter, which counts the same."""
    from torch.utils.flop_counter import FlopCounterMode

    assert preset_config("vit-base-patch16-224", num_labels=1000).forward_flops / 1e9 == pytest.approx(35.1, abs=0.1)
    for changes in ({}, {"pooling": "mean", "head_hidden_size": 96}):
        config = preset_config("vit-demo-patch8-32", num_labels=7, **changes)
        model = ViTForImageClassification(config).eval()
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
        assert counter.get_total_flops() == config.forward_flops
