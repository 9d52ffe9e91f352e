"""CKA, colours of features and saliency against values known by hand."""

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, VIT
from vit_hf.analysis.features import MAX_TOKENS, feature_colours, linear_cka, logits_of, saliency, spread
from vit_hf.models.presets import from_preset

MEAN = STD = torch.full((3, 1, 1), 0.5)


def rows(n=40, width=6, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_cka_sees_through_rotation_scale_and_shift():
    x = rows()
    rotation, _ = torch.linalg.qr(rows(6, 6, seed=1))
    similarity = linear_cka([x, 3 * x @ rotation + 5, rows(seed=2)])
    assert similarity[0, 1] == pytest.approx(1, abs=1e-5) and similarity[0, 2] < 0.5
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-5)


def test_cka_is_the_papers_formula_for_layers_of_other_widths():
    x, y = rows(width=5).double().numpy(), rows(width=9, seed=1).double().numpy()
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.linalg.norm
    expected = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    assert linear_cka([rows(width=5), rows(width=9, seed=1)])[0, 1] == pytest.approx(expected, rel=1e-4)


def test_cka_by_hand():
    """Two orthogonal features of three tokens: nothing in common; one feature within two: 1/sqrt(2)."""
    a, b = torch.tensor([[1.0], [-1], [0], [0]]), torch.tensor([[0.0], [0], [1], [-1]])
    similarity = linear_cka([a, b, torch.cat((a, b), dim=1)])
    np.testing.assert_allclose(similarity, [[1, 0, 0.5**0.5], [0, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]], atol=1e-6)


def test_a_layer_that_tells_no_tokens_apart_has_no_similarity():
    assert np.isnan(linear_cka([torch.ones(4, 2), rows(4, 2)])).tolist() == [[True, True], [True, False]]


def test_tokens_that_stand_for_a_layer_are_bounded_and_spread():
    tokens = torch.arange(1369.0)[None, :, None]
    part = spread(tokens, images=8)
    assert len(part) * 8 == MAX_TOKENS and part[0] == 0 and part[-1] == 1368
    assert spread(tokens[:, :16], images=8).flatten().tolist() == list(range(16))
    assert len(spread(tokens, images=5000)) == 1


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
