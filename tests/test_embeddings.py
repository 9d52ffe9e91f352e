"""Filters whose principal components are known, and the similarity of every kind of position."""

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, VIT
from vit_hf.analysis.embeddings import (
    colour_structure,
    first_weight,
    looks_grey,
    patch_filters,
    position_similarity,
    principal_components,
    stem_filters,
)
from vit_hf.models.presets import from_preset


def make(**changes):
    torch.manual_seed(0)
    return from_preset("vit-demo-patch8-32", ["a"], VIT | changes).vit


def test_components_of_filters_made_of_two_pictures_are_those_pictures():
    vit = make()
    flat = torch.zeros(2, 3, 8, 8)
    flat[0, 0, :, :4] = 1  # the left half in red
    flat[1, 2, 5, 5] = -1  # one blue pixel
    signs = torch.tensor([[1.0, 1.0], [1, -1], [-1, 1], [-1, -1]]).repeat(8, 1)  # 32 filters, uncorrelated
    weight = 0.7 + torch.einsum("dk,kcij->dcij", signs * torch.tensor([3.0, 5.0]), flat)
    with torch.no_grad():
        vit.embeddings.patch_embeddings.projection.weight.copy_(weight)  # 0.7: what all have in common is no component
    components, shares = patch_filters(vit)
    assert components.shape == (28, 8, 8, 3)
    variances = np.array([9 * 32, 25 * 1])  # strength^2 times pixels
    np.testing.assert_allclose(shares[:2], variances / variances.sum(), rtol=1e-5)
    np.testing.assert_allclose(shares[2:], 0, atol=1e-6)
    np.testing.assert_allclose(components[0], flat[0].permute(1, 2, 0) / 32**0.5, atol=1e-5)
    np.testing.assert_allclose(components[1], -flat[1].permute(1, 2, 0), atol=1e-5)  # the largest value is positive


def test_components_are_orthogonal_and_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    points = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    directions, shares = principal_components(points, 5)
    reference = PCA(5).fit(points.numpy())
    torch.testing.assert_close(directions @ directions.T, torch.eye(5), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.abs(directions.numpy()), np.abs(reference.components_), atol=1e-4)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, rtol=1e-4)


def test_few_filters_have_few_components_and_other_stems_none():
    assert len(patch_filters(make(hidden_size=8))[0]) == 7
    assert len(patch_filters(make(patch_size=2))[0]) == 12  # 2 x 2 pixels of three colours
    assert patch_filters(make(patch_size=[4, 8]))[0].shape == (28, 4, 8, 3)
    for family in ("conv", "hybrid"):
        preset, changes = FAMILIES[family]
        assert patch_filters(from_preset(preset, ["a"], changes).vit) is None


def test_the_components_of_grey_data_are_those_of_the_channels_added_up():
    """What is learned of grey images is hidden by the noise that the differences of colours keep from the start."""
    vit = make()
    pattern = torch.zeros(8, 8)
    pattern[2:5] = 1
    noise = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    noise -= noise.mean(dim=1, keepdim=True)  # sees nothing in a grey image
    strength = torch.tensor([1.0, -1.0]).repeat(16)[:, None, None, None]
    with torch.no_grad():
        vit.embeddings.patch_embeddings.projection.weight.copy_(0.2 * strength * pattern + noise)
    components, shares = patch_filters(vit, grey_std=torch.full((3,), 0.5))
    assert components.shape == (28, 8, 8, 1) and shares[0] == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(components[0, :, :, 0], pattern / 24**0.5, atol=1e-4)
    assert patch_filters(vit)[1][0] < 0.2


def test_filters_added_up_see_grey_images_as_all_filters_do():
    vit, std = make(), torch.tensor([0.2, 0.5, 0.25])
    grey = torch.rand(3, 1, 8, 8)
    seen = torch.nn.functional.conv2d(grey / std[:, None, None], first_weight(vit))
    added = torch.from_numpy(stem_filters(vit, std)).permute(0, 3, 1, 2)
    torch.testing.assert_close(torch.nn.functional.conv2d(grey, added), seen, atol=1e-5, rtol=1e-4)


def test_whether_filters_have_learned_of_colours():
    noise = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(torch.randn(64, 3, 10, 10), 3, stride=1)
    alike = noise[:, :1].expand(-1, 3, -1, -1)
    assert abs(colour_structure(noise)) < 0.05 < 0.5 < colour_structure(smooth) and colour_structure(alike) is None
    # by weights alone where channels are alike; by the images too where they differ
    assert [looks_grey(weight, True) for weight in (noise, smooth, alike)] == [True, False, True]
    assert [looks_grey(weight, False) for weight in (noise, smooth, alike)] == [False, False, True]


@pytest.mark.parametrize("family", ["conv", "hybrid", "resnet", "bit"])
def test_stem_filters_are_those_of_the_convolution_that_sees_the_image(family):
    preset, changes = FAMILIES[family]
    model = from_preset(preset, ["a"], changes).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda module, inputs: seen.append((module.weight, inputs[0].shape[1])))
    model(torch.randn(1, 3, 32, 32))
    weight, channels = seen[0]
    assert channels == 3
    np.testing.assert_array_equal(stem_filters(model, number=5), weight.detach()[:5].permute(0, 2, 3, 1))


def cosine(a, b):
    return float(a @ b / np.sqrt(a @ a * (b @ b)))


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d", "sincos_2d", "relative"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_position_is_like_itself_and_its_tile_is_at_its_place(kind, pooling):
    vit = make(position_embedding=kind, pooling=pooling, num_register_tokens=1)
    for grid in ((4, 4), (2, 6)):
        similarity = position_similarity(vit, grid)
        assert similarity.shape == (*grid, *grid) and np.abs(similarity).max() <= 1
        square = similarity.reshape(np.prod(grid), -1)
        np.testing.assert_allclose(np.diag(square), 1, atol=1e-5)
        np.testing.assert_allclose(square, square.T, atol=1e-6)


def test_the_class_tokens_position_is_left_out():
    vit = make()
    positions = vit.embeddings.position_embeddings[0].detach().numpy()  # row 0 is the class token's
    similarity = position_similarity(vit, (4, 4))
    assert similarity[0, 0, 0, 1] == pytest.approx(cosine(positions[1], positions[2]), abs=1e-5)
    assert similarity[1, 2, 3, 0] == pytest.approx(cosine(positions[1 + 6], positions[1 + 12]), abs=1e-5)


def test_of_rows_and_columns_that_share_nothing_half_is_left():
    vit = make(position_embedding="learned_2d")
    with torch.no_grad():
        vit.embeddings.row_position_embeddings[0].copy_(torch.eye(4, 16))
        vit.embeddings.column_position_embeddings[0].copy_(torch.eye(4, 16))
    similarity = position_similarity(vit, (4, 4))
    expected = [[0, 0, 0.5, 0], [0.5, 0.5, 1, 0.5], [0, 0, 0.5, 0], [0, 0, 0.5, 0]]
    np.testing.assert_allclose(similarity[1, 2], expected, atol=1e-6)


def test_a_relative_position_is_its_biases_in_all_layers_and_heads():
    vit = make(position_embedding="relative", num_register_tokens=1)
    index = vit.relative_position_index[2:, 2:].numpy()  # without class token and register
    rows = []
    for layer in vit.layers:
        table = layer.attention.relative_position_bias_table.detach().numpy()
        bias = table[index]  # (16, 16, heads)
        rows.append((bias - bias.mean(axis=1, keepdims=True)).reshape(16, -1))
    rows = np.concatenate(rows, axis=1)
    expected = np.array([[cosine(a, b) for b in rows] for a in rows])
    np.testing.assert_allclose(position_similarity(vit, (4, 4)).reshape(16, 16), expected, atol=1e-5)


def test_a_constant_bias_tells_no_place():
    """It does not change a softmax, so it makes no position like another."""
    vit = make(position_embedding="relative")
    before = position_similarity(vit, (4, 4))
    with torch.no_grad():
        for layer in vit.layers:
            layer.attention.relative_position_bias_table += 7
    np.testing.assert_allclose(position_similarity(vit, (4, 4)), before, atol=1e-4)


def test_without_positions_there_is_no_similarity():
    assert position_similarity(make(position_embedding="none"), (4, 4)) is None
