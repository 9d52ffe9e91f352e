"""Architectures by name, and models built from them or from weights."""

import re

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

from vit_hf.models import ResNetForImageClassification, ViTConfig, ViTForImageClassification
from vit_hf.models.positions import resize_position_embeddings
from vit_hf.models.presets import PRESETS, from_preset, preset_config
from vit_hf.models.transfer import for_new_labels, load_pretrained

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


def test_vit_base_has_the_counts_written_out():
    """Table 1 of the ViT paper says 86 M; here to the parameter, with the formula of each part."""
    width, mlp, tokens = 768, 3072, 197
    layer = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    expected = 12 * layer + tokens * width + width + (3 * 16 * 16 + 1) * width + 2 * width + (width + 1) * 1000
    with torch.device("meta"):
        model = ViTForImageClassification(preset_config("vit-base-patch16-224", num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == expected == 86_567_656


def test_plain_presets_are_stock_and_take_changes():
    for name in PRESETS:
        ours = name.startswith("r") and "vit" in name or name.endswith(("better-baseline", "cifar"))
        assert preset_config(name).is_stock != ours
    config = preset_config("vit-demo-patch8-32", {"num_hidden_layers": 2, "pooling": "mean"})
    assert (config.num_hidden_layers, config.pooling, config.is_stock) == (2, "mean", False)
    assert config.hidden_size == 128


def test_names_of_presets_say_patch_and_image_size():
    for name in PRESETS:
        config = preset_config(name)
        if found := re.search(r"-patch(\d+)-(\d+)", name):
            assert (config.patch_size, config.image_size) == tuple(map(int, found.groups()))
    assert {"vit-large-patch16-224", "vit-huge-patch14-224", "vit-small-patch4-32"} <= PRESETS.keys()


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(ValueError, match="did you mean vit-base-patch16-224"):
        preset_config("vit-base-patch16-244")
    with pytest.raises(ValueError, match="r26-vit-small-patch1-224"):
        preset_config("r26-vit-small")
    with pytest.raises(ValueError, match="no such preset; `vit-hf models` lists them"):
        preset_config("xyz")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 30}, "image_size 30 is not divisible by patch_size 8"),
        ({"image_size": [32, 36]}, "image_size 36 is not divisible by patch_size 8"),
        ({"image_size": 4, "patch_size": 8}, "image_size 4"),
        ({"hidden_size": 130}, "hidden_size 130 is not divisible by num_attention_heads 4"),
        ({"pooling": "max"}, "pooling: 'max' is not one of cls, mean, map"),
        ({"position_embedding": "rope"}, "position_embedding: 'rope' is not one of learned_1d, .*, relative, none"),
        ({"stem": "conv1d"}, "stem: 'conv1d' is not one of patch, hybrid_resnet, conv"),
        ({"initializer": "jax"}, "initializer: 'jax' is not one of transformers, paper"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: 1.0 is out of range"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob: -0.1 is out of range"),
        ({"layer_scale_init": 0.0}, "layer_scale_init: 0.0 is out of range, allowed is above 0, or none"),
        ({"num_register_tokens": -1}, "num_register_tokens: -1 is out of range, allowed is 0 or more"),
        ({"head_hidden_size": 0}, "head_hidden_size: 0"),
        (
            {"hidden_size": 132, "num_attention_heads": 66, "position_embedding": "sincos_2d", "patch_size": 5},
            "image_size 32 is not divisible by patch_size 5",
        ),
        (
            {"hidden_size": 130, "num_attention_heads": 2, "position_embedding": "sincos_2d"},
            "hidden_size 130 is not divisible by position_embedding sincos_2d: 4",
        ),
        (
            {"hidden_size": 33, "num_attention_heads": 3, "position_embedding": "learned_2d"},
            "hidden_size 33 is not divisible by position_embedding learned_2d: 2",
        ),
        ({"stem": "conv", "image_size": 36, "patch_size": 12}, "patch_size 12 is no power of 2"),
        ({"stem": "conv", "patch_size": [8, 4]}, "no power of 2"),
        ({"stem": "hybrid_resnet"}, "image_size 32 is not divisible by the stem's stride times patch_size, 128"),
        ({"stem": "hybrid_resnet", "patch_size": 1, "stem_width": 48}, "stem_width 48 is not divisible by .* 32"),
        ({"stem": "hybrid_resnet", "patch_size": 1, "stem_depths": [2, 0]}, "stem_depths: 0 is out of range"),
        ({"stem_depths": [2, 2]}, "stem_depths and stem_width describe stem hybrid_resnet; the stem is patch"),
        ({"fc_norm": True}, "fc_norm norms the mean of the tokens: it goes with pooling mean, not cls"),
        ({"num_hidden_layers": "six"}, "^Field 'num_hidden_layers' expected int, got str"),
        ({"layer_scale_init": float("nan")}, "layer_scale_init: nan is out of range"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps: -1.0 is out of range, allowed is above 0"),
        ({"initializer_range": float("nan")}, "initializer_range: nan is out of range"),
        ({"head_bias_init": float("inf")}, "head_bias_init: inf is not a finite number"),
        ({"pooler_act": "foo"}, "pooler_act: 'foo' is not one of"),
        ({"qk_norm": 3}, "^Field 'qk_norm' expected bool, got int"),
        ({"num_register_tokens": 1.5}, "^Field 'num_register_tokens' expected int, got float"),
        ({"stem_depths": ["two"]}, "^Field 'stem_depths' with value"),
        ({"image_size": [32]}, r"image_size: \[32\] is neither a side nor \[height, width\]"),
    ],
)
def test_wrong_fields_are_named_with_their_value(changes, message):
    with pytest.raises(ValueError, match=message):
        preset_config("vit-demo-patch8-32", changes)


def test_wrong_types_of_a_baselines_fields_are_named():
    for changes in ({"cifar_stem": "no"}, {"image_size": "32"}, {"depths": 3}):
        with pytest.raises(ValueError, match=f"^Field '{next(iter(changes))}'"):
            preset_config("resnet-18", changes)


def test_unknown_override_is_refused():
    with pytest.raises(ValueError, match="'drop_path' is no field of ViTConfig, nearest: drop_path_rate"):
        from_preset("vit-demo-patch8-32", ["a"], {"pooling": "mean", "drop_path": 0.1})
    with pytest.raises(ValueError, match="'pooling' is no field of ResNetConfig, nearest: .*depths"):
        from_preset("resnet-18", ["a"], {"pooling": "mean"})
    with pytest.raises(ValueError, match="'drop_path' is no field of ViTConfig"):
        for_new_labels(tiny_model(), ["a"], {"drop_path": 0.1})
    with pytest.raises(ValueError, match="'num_labels'"):  # belongs to the data, not to the architecture
        from_preset("vit-demo-patch8-32", ["a"], {"num_labels": 3})


def test_none_is_a_position_embedding_and_the_absence_of_a_head():
    found = {"position_embedding": None, "head_hidden_size": None, "num_hidden_layers": 1}
    config = from_preset("vit-demo-patch8-32", ["a"], found).config
    assert config.position_embedding == "none" and config.head_hidden_size is None


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


@pytest.mark.parametrize("kind", ["learned_2d", "sincos_2d", "relative", "none"])
def test_every_position_embedding_goes_to_another_image_size(kind):
    """The tuned model of the new size is the pretrained one that interpolates; only what depends on the grid changes."""
    model = tiny_model(position_embedding=kind, num_register_tokens=1)
    tuned = for_new_labels(model, list(model.config.id2label.values()), {"image_size": [24, 32]}, keep_head=True)
    assert len(encoder_differences(model, tuned)) == {"learned_2d": 2, "sincos_2d": 0, "relative": 2, "none": 0}[kind]
    pixel_values = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        expected = model(pixel_values, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(tuned.eval()(pixel_values).logits, expected, rtol=0, atol=1e-5)


def test_relative_positions_lose_the_class_token_with_it():
    model = tiny_model(position_embedding="relative")
    tuned = for_new_labels(model, ["a"], {"pooling": "mean"})
    key = "vit.layers.1.attention.relative_position_bias_table"
    assert torch.equal(tuned.state_dict()[key], model.state_dict()[key][:-3])


def test_another_kind_of_position_embedding_says_what_to_do():
    with pytest.raises(ValueError, match="the weights have relative, which cannot become none; leave .* --preset"):
        for_new_labels(tiny_model(position_embedding="relative"), ["a"], {"position_embedding": "none"})


def test_a_baseline_gets_a_zero_head_on_the_same_encoder():
    model = from_preset(
        "resnet-18-cifar", ["a", "b"], {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
    )
    model.resnet.embedder.embedder.normalization.running_mean.fill_(0.5)
    tuned = for_new_labels(model, ["x", "y", "z"], {"image_size": 64})
    assert tuned.config.image_size == 64 and tuned.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert not any(parameter.any() for parameter in tuned.classifier.parameters())
    for name, tensor in model.resnet.state_dict().items():
        assert torch.equal(tensor, tuned.resnet.state_dict()[name]), name


def test_kept_head_gives_the_same_logits():
    model = tiny_model(head_hidden_size=8)
    names = list(model.config.id2label.values())
    kept = for_new_labels(model, names, {"drop_path_rate": 0.1}, keep_head=True).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(kept(pixel_values).logits, model(pixel_values).logits)
    assert kept.config.drop_path_rate == 0.1


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 64}, {"patch_size": 8},
     {"num_attention_heads": 4}, {"num_register_tokens": 1}],
)  # fmt: skip
def test_another_encoder_is_refused(changes):
    """Also where all shapes are the same, as with another number of heads."""
    with pytest.raises(
        ValueError, match=f"--config_overrides makes another encoder .* which has {next(iter(changes))}"
    ):
        for_new_labels(tiny_model(), ["a", "b"], changes)


def test_a_new_head_may_start_with_a_bias():
    tuned = for_new_labels(tiny_model(), ["a", "b"], {"head_bias_init": -2.0})
    assert (tuned.classifier.bias == -2).all() and not tuned.classifier.weight.any()


def test_a_model_of_another_kind_is_refused():
    """One that load_pretrained returned as transformers' own class."""
    config = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=16)
    with pytest.raises(ValueError, match=r"its family \(model_type\) is swin; trained are vit, vit_hf, resnet"):
        for_new_labels(transformers.SwinForImageClassification(config), ["a", "b"], {})


def test_a_folder_of_another_family_is_refused_with_both_names(tmp_path):
    config = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=16)
    config.save_pretrained(tmp_path)
    for cls, names in ((ViTForImageClassification, "vit and vit_hf"), (ResNetForImageClassification, "resnet and")):
        with pytest.raises(ValueError, match=f"is swin; .* reads {names}"):
            cls.from_pretrained(tmp_path)


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


def test_a_timm_folder_says_that_it_has_to_be_converted(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "num_classes": 10}')
    with pytest.raises(ValueError, match="its config.json is timm's: .* vit-hf convert .* DIR"):
        load_pretrained(str(tmp_path))


def test_a_misspelt_switch_is_refused_in_python_too():
    with pytest.raises(
        ValueError, match="'position_embeding' is no field of ViTConfig, did you mean position_embedding"
    ):
        ViTConfig(**TINY, position_embeding="none")


def test_folder_that_does_not_exist_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError):
        load_pretrained(str(tmp_path / "nowhere"))
