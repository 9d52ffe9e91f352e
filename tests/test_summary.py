"""Sizes and costs of the presets, against the papers' tables and against real models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_hf.models import ViTConfig
from vit_hf.models.presets import build, make_config, preset_config
from vit_hf.models.summary import _measure, stages, summarise

# millions of parameters at 1,000 classes. ViT: ViT paper, table 1 (86, 307, 632 M) and timm's results table (5.72, 22.05,
# 86.57, 304.33, 632.05); g, G: "Scaling Vision Transformers", table 2 (1011 M and 1843 M); hybrids: timm's table;
# ResNet: torchvision (25.557, 11.690), BiT: timm (25.55)
MILLIONS = {
    "vit-tiny-patch16-224": 5.72, "vit-small-patch16-224": 22.05, "vit-small-patch32-224": 22.88,
    "vit-base-patch16-224": 86.57, "vit-base-patch32-224": 88.22, "vit-base-patch8-224": 86.58,
    "vit-large-patch16-224": 304.33, "vit-large-patch32-384": 306.63, "vit-huge-patch14-224": 632.05,
    "r26-vit-small-patch1-224": 36.43, "r50-vit-base-patch1-224": 98.66, "r50-stage4-vit-large-patch1-224": 328.99,
    "resnet-50": 25.56, "resnet-18": 11.69, "bit-resnet-50": 25.55,
}  # fmt: skip
# GMACs (half of the FLOPs): DeiT's and timm's tables
GMACS = {
    "vit-tiny-patch16-224": 1.26, "vit-small-patch16-224": 4.61, "vit-base-patch16-224": 17.58,
    "vit-base-patch16-384": 55.54, "vit-large-patch16-224": 61.60, "resnet-50": 4.11, "resnet-18": 1.82,
}  # fmt: skip


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_agree_with_the_papers(name):
    assert summarise(preset_config(name, num_labels=1000)).num_parameters / 1e6 == pytest.approx(
        MILLIONS[name], abs=0.01
    )


@pytest.mark.parametrize("name, millions", [("vit-giant-patch14-224", 1011), ("vit-gigantic-patch14-224", 1843)])
def test_the_largest_agree_to_the_digits_of_their_paper(name, millions):
    assert summarise(preset_config(name, num_labels=1000)).num_parameters / 1e6 == pytest.approx(millions, abs=2)


@pytest.mark.parametrize("name", GMACS)
def test_operations_agree_with_the_published_tables(name):
    flops = summarise(preset_config(name, num_labels=1000)).forward_flops
    assert flops / 2e9 == pytest.approx(GMACS[name], rel=0.015)


VARIANTS = [
    {},
    {"pooling": "mean", "head_hidden_size": 96},
    {"pooling": "map", "num_register_tokens": 2, "position_embedding": "relative"},
    {"stem": "hybrid_resnet", "stem_depths": [1, 1], "stem_width": 32, "patch_size": 1},
    {"stem": "conv", "layer_scale_init": 0.1, "qk_norm": True},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_counts_are_those_of_the_real_model(changes):
    """Real tensors through attention written out, counted by torch."""
    config = preset_config("vit-demo-patch8-32", changes, num_labels=7)
    size = summarise(config)
    model = build(config).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        tokens = model.vit(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[1]
        counted = counter.get_total_flops()
        model(torch.zeros(1, 3, 32, 32), output_hidden_states=True)  # every token of the last layer too
    assert size.forward_flops == counter.get_total_flops() - counted
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.num_tokens == tokens and size.state_bytes == 16 * size.num_parameters


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_deep_model_costs_what_its_layers_cost(changes):
    config = preset_config("vit-demo-patch8-32", changes, num_labels=7)
    size = summarise(config)
    assert (size.num_parameters, size.forward_flops, size.activation_bytes) == _measure(config)


def test_activations_grow_with_depth_and_resolution():
    """Of ViT-B/16 in bf16: about 34 values a token, width and layer in 16 bits, and no weights among them."""
    one = summarise(make_config(ViTConfig, dict(image_size=224, num_labels=1000)))
    assert one.activation_bytes == pytest.approx(12 * 197 * 768 * 34, rel=0.05)
    larger = summarise(make_config(ViTConfig, dict(image_size=448, num_labels=1000)))
    assert 3.5 < larger.activation_bytes / one.activation_bytes < 4.5


@pytest.mark.parametrize(
    "name, changes",
    [("resnet-50", {"image_size": 32}), ("vit-demo-patch8-32", {"stem": "conv", "patch_size": 32})],
)
def test_a_feature_map_of_one_point_is_measured_too(name, changes):
    """BatchNorm refuses it for a single image in training."""
    assert summarise(preset_config(name, changes, num_labels=10)).activation_bytes > 0


def test_stages_show_what_becomes_of_an_image():
    shapes = dict(stages(preset_config("r50-vit-base-patch1-224", {"num_hidden_layers": 1}, num_labels=1000)))
    backbone = "vit.embeddings.patch_embeddings.backbone"
    assert [shapes[f"{backbone}.stages.{stage}"] for stage in range(3)] == [
        (1, 256, 56, 56), (1, 512, 28, 28), (1, 1024, 14, 14)
    ]  # fmt: skip
    assert shapes["vit.embeddings.patch_embeddings"] == (1, 196, 768) and shapes["vit.layers.0"] == (1, 197, 768)
    assert list(shapes)[0] == "pixel_values" and shapes["classifier"] == (1, 1000)
    shapes = dict(stages(preset_config("resnet-18-cifar", num_labels=10)))
    assert shapes["resnet.embedder"] == (1, 64, 32, 32) and shapes["resnet.encoder.stages.3"] == (1, 512, 4, 4)
