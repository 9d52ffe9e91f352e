"""Colours of features, saliency and Grad-CAM against values known by hand and against autograd."""

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, VIT
from vit_hf.analysis.features import feature_colours, grad_cam, logits_of, saliency
from vit_hf.models.presets import from_preset

MEAN = STD = torch.full((3, 1, 1), 0.5)


def test_colours_are_the_same_for_the_same_feature_in_every_image():
    tokens = torch.zeros(2, 4, 5)
    tokens[0, 1, 0], tokens[1, 2, 0] = 9.0, 9.0  # one feature, at another place in each image
    tokens[0, 3, 1] = 3.0
    colours = feature_colours(tokens, (2, 2))
    assert colours.shape == (2, 2, 2, 3) and colours.min() == 0 and colours.max() == 1
    np.testing.assert_allclose(colours[0, 0, 1], colours[1, 1, 0], atol=1e-6)
    assert np.ptp(colours[..., 0]) == 1 and colours[0, 0, 1, 0] == pytest.approx(1)  # the strongest is red
    np.testing.assert_allclose(colours[0, 0, 0], colours[1, 0, 0], atol=1e-6)


def test_colours_of_features_without_three_directions():
    assert feature_colours(torch.ones(1, 4, 8), (2, 2)).tolist() == np.zeros((1, 2, 2, 3)).tolist()
    assert feature_colours(torch.arange(4.0)[None, :, None], (1, 4))[0, 0, :, 0] == pytest.approx([0, 1 / 3, 2 / 3, 1])


class Linear(torch.nn.Module):
    """logits (B, 2) = what two pictures of weights see."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, pixel_values):
        from transformers.modeling_outputs import ImageClassifierOutput

        return ImageClassifierOutput(logits=torch.einsum("bchw,kchw->bk", pixel_values, self.weight))


def test_saliency_of_a_linear_model_is_its_weight():
    weight = torch.zeros(2, 3, 4, 4)
    weight[1, :, 1, 2] = torch.tensor([1.0, -3, 2])
    weight[1, 2, 0, 0] = 0.5
    model = Linear(weight)
    image = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    image[0, 1] = 0  # so that class 1 wins
    map, winner, chance = saliency(model, image, MEAN, torch.tensor([0.5, 0.25, 0.5])[:, None, None])
    expected = np.zeros((4, 4))
    expected[1, 2], expected[0, 0] = 3 / 0.25, 0.5 / 0.5  # of a pixel in [0, 1], the channel that weighs most
    np.testing.assert_allclose(map, expected)
    score = 1 - 3 * -2 + 2 + 0.5
    assert winner == 1 and chance == pytest.approx(1 / (1 + np.exp(-score)), rel=1e-5)
    assert model.weight.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_the_derivative_of_the_models_own_logit(family):
    preset, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = from_preset(preset, ["a", "b", "c"], changes | {"initializer_range": 0.2} if "vit" in preset else changes)
    model.eval()
    torch.nn.init.normal_(
        model.classifier.weight if hasattr(model.classifier, "weight") else model.classifier[-1].weight
    )
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    map, winner, _ = saliency(model, image, MEAN, STD)
    pixels = (image.float() / 255).requires_grad_()
    logits = model((pixels - MEAN) / STD).logits[0]
    logits[logits.argmax()].backward()
    assert winner == int(logits.argmax()) and map.max() > 0
    np.testing.assert_allclose(map, pixels.grad[0].abs().amax(dim=0), rtol=1e-3, atol=1e-5 * map.max())


def test_logits_at_another_size_are_the_models_own():
    model = from_preset("vit-demo-patch8-32", ["a", "b"], VIT | {"head_hidden_size": 8}).eval()
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(logits_of(model, images), model(images, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("family", ["resnet", "resnet-18", "bit", "bit-224", "hybrid"])
def test_grad_cam_is_the_papers_by_autograd_through_the_models_own_forward_pass(family):
    preset, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = from_preset(preset, ["a", "b", "c"], changes).eval().requires_grad_(False)  # frozen weights too
    head = model.classifier if family == "hybrid" else model.classifier[-1]
    torch.nn.init.normal_(head.weight)
    image = torch.randn(1, 3, 32, 32)
    found = grad_cam(model, image)

    if family == "hybrid":
        pixels = image.clone().requires_grad_()
        backbone = model.vit.embeddings.patch_embeddings.backbone
        last_map = backbone(pixels)
        backbone.forward = lambda pixel_values: last_map
        logits = model(pixels).logits[0]
        logits.max().backward(inputs=[last_map])
        weights = last_map.grad[0].mean(dim=(1, 2))
        last_map = last_map[0].detach()
    else:  # the map, averaged, is what the linear head reads: its weights over the places are the derivative
        states = model(image, output_hidden_states=True)
        last_map = states.hidden_states[-1][0] if "resnet" in family else model.bit.norm(states.hidden_states[-1])[0]
        weights = head.weight[states.logits.argmax()] / last_map[0].numel()
    expected = torch.zeros(last_map.shape[1:])
    for weight, channel in zip(weights, last_map, strict=True):
        expected += weight * channel
    assert found.shape == expected.shape and found.min() >= 0
    np.testing.assert_allclose(found, expected.clamp_min(0), rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_vit_of_patches_has_no_feature_map():
    assert grad_cam(from_preset("vit-demo-patch8-32", ["a"], VIT).eval(), torch.randn(1, 3, 32, 32)) is None
