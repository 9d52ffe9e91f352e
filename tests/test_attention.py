"""Attention by construction, by hand, and by transformers' own output_attentions."""

import math

import numpy as np
import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef

from tests.families import FAMILIES, VIT
from vit_hf.analysis.attention import look, mean_distance, patch_distances, roll, run_layers, uniform_distance
from vit_hf.models.presets import from_preset

PRESET = "vit-demo-patch8-32"


def make(size=32, **changes):
    torch.manual_seed(0)
    model = from_preset(PRESET, ["a", "b"], VIT | changes).eval()
    return model, torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))


def no_preference(model):
    """Queries of zero: every token attends to all alike."""
    for module in model.modules():
        if hasattr(module, "q_proj"):
            torch.nn.init.zeros_(module.q_proj.weight)
            torch.nn.init.zeros_(module.q_proj.bias)
    return model


def test_distances_between_patches_are_in_pixels():
    apart = patch_distances((2, 3), (8, 4))  # rows 8 pixels apart, columns 4
    first = [0, 4, 8, 8, math.hypot(8, 4), math.hypot(8, 8)]
    assert apart[0].tolist() == pytest.approx(first) and torch.equal(apart, apart.T)


def test_the_distance_of_attention_to_one_neighbour_or_to_oneself_is_known():
    apart = patch_distances((1, 4), (16, 16))
    right = torch.zeros(4, 4)
    right[[0, 1, 2, 3], [1, 2, 3, 0]] = 1  # each to the next one, the last to the first: 16, 16, 16 and 48 pixels
    assert mean_distance(torch.stack([torch.eye(4), right]), apart).tolist() == [0, 24]


def test_attention_to_the_class_token_is_at_distance_0_or_left_out():
    apart = patch_distances((1, 2), (16, 16))
    weights = torch.tensor([[[1.0, 0, 0], [0.9, 0.0, 0.1], [0.8, 0.2, 0.0]]])  # token 0 is the class token
    assert mean_distance(weights, apart).tolist() == pytest.approx([(0.1 * 16 + 0.2 * 16) / 2])
    assert mean_distance(weights, apart, renormalise=True).tolist() == pytest.approx([16])


def test_the_distance_is_that_of_the_authors_code():
    """Google-research/vision_transformer, issue 162, as it is posted there, for one head of one example."""
    img_w = img_h = 224
    patch_res = 14
    factor = img_w / patch_res

    def get_distance_map(query_col, query_row):
        x, y = np.meshgrid(
            np.linspace(0, img_w - 1.0 * factor, patch_res) - query_col * factor,
            np.linspace(0, img_h - 1.0 * factor, patch_res) - query_row * factor,
        )
        return np.sqrt(x**2.0 + y**2.0)

    maps = np.stack([get_distance_map(column, row) for row in range(patch_res) for column in range(patch_res)])
    maps = maps.reshape(patch_res**2, patch_res**2)
    weights = torch.randn(3, 197, 197, generator=torch.Generator().manual_seed(0)).mul(2).softmax(dim=-1)
    expected = [np.mean(np.sum(maps * head[1:, 1:], axis=-1)) for head in weights.numpy()]
    found = mean_distance(weights, patch_distances((14, 14), (16, 16)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"num_register_tokens": 3}, {"pooling": "mean"}, {"pooling": "map"}])
def test_uniform_attention_has_the_mean_distance_and_flat_maps(changes):
    model, image = make(**changes)
    y, x = np.divmod(np.arange(16), 4)
    by_hand = np.hypot(8 * (y[:, None] - y), 8 * (x[:, None] - x)).mean()
    tokens = 16 + model.config.num_prefix_tokens
    for renormalise, share in ((False, 16 / tokens), (True, 1)):
        seen, _ = look(no_preference(model).vit, image, renormalise=renormalise)
        assert seen.distance.shape == (2, 2) and seen.distance == pytest.approx(by_hand * share, rel=1e-5)
        assert uniform_distance(model.vit, (4, 4), renormalise) == pytest.approx(by_hand * share, rel=1e-5)
    assert seen.rollout == pytest.approx(1 / 16, rel=1e-5) and seen.heads.shape == (2, 4, 4)
    assert seen.heads == pytest.approx(1 / tokens, rel=1e-5)


def test_distance_at_another_shape_and_with_a_hybrid_stem_counts_pixels():
    model, image = make(size=(16, 48), pooling="mean")
    seen, _ = look(no_preference(model).vit, image)
    y, x = np.divmod(np.arange(12), 6)
    assert seen.distance == pytest.approx(np.hypot(8 * (y[:, None] - y), 8 * (x[:, None] - x)).mean(), rel=1e-5)
    preset, changes = FAMILIES["hybrid"]
    hybrid = no_preference(from_preset(preset, ["a"], changes).eval())
    assert hybrid.config.token_stride == (8, 8)
    distance = look(hybrid.vit, torch.randn(1, 3, 32, 32), renormalise=True)[0].distance  # it has a class token
    y, x = np.divmod(np.arange(16), 4)
    assert distance == pytest.approx(np.hypot(8 * (y[:, None] - y), 8 * (x[:, None] - x)).mean(), rel=1e-4)


def test_rollout_by_hand():
    """Two tokens: the first looks at the second in layer 1, the second at the first in layer 2."""
    first, second = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rolled = roll(roll(None, first), second)
    # (W + I) / 2: layer 1 [[.5, .5], [0, 1]], layer 2 [[1, 0], [.5, .5]]; their product, the later layer on the left
    assert rolled.tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert roll(roll(None, torch.eye(3)), torch.eye(3)).tolist() == torch.eye(3).tolist()


def test_an_output_token_that_looks_at_one_patch_lights_that_patch_alone():
    """One-hot attention by construction: the position of a patch is the only thing that keys see."""
    model, image = make(num_hidden_layers=1, num_attention_heads=1, layer_norm_eps=1e-6)
    vit, config = model.vit, model.config
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        layer = vit.layers[0]
        layer.layernorm_before.weight.fill_(1)
        vit.embeddings.position_embeddings[0, 1 + 6, 0] = 1.0  # patch 6: row 1, column 2
        layer.attention.q_proj.bias[0] = 100.0
        layer.attention.k_proj.weight[0, 0] = 100.0
    seen, _ = look(vit, image)
    expected = np.zeros((4, 4))
    expected[1, 2] = 1
    assert config.hidden_size == 32
    assert seen.heads[0] == pytest.approx(expected, abs=1e-6) and seen.rollout == pytest.approx(expected, abs=1e-6)


def stock_attention(model, pixel_values):
    """Weights (layers, heads, N, N) of transformers' own model with the same tensors, and its last hidden state."""
    stock = transformers.ViTForImageClassification(model.config.to_stock())
    stock.load_state_dict(model.state_dict())
    stock.set_attn_implementation("eager")
    output = stock.eval()(pixel_values, output_attentions=True)
    return torch.stack([weights[0] for weights in output.attentions]).double().detach().numpy()


def test_all_numbers_are_those_of_transformers_own_attention():
    model, image = make(initializer_range=0.3)
    weights = stock_attention(model, image)
    layers, heads, tokens, _ = weights.shape
    distance, renormalised, rolled = np.zeros((layers, heads)), np.zeros((layers, heads)), np.eye(tokens)
    for layer in range(layers):
        mixed = weights[layer].mean(axis=0) + np.eye(tokens)
        rolled = mixed / mixed.sum(axis=1, keepdims=True) @ rolled
        for head in range(heads):
            for query in range(16):
                row = weights[layer, head, 1 + query, 1:]
                far = [math.hypot(8 * (query // 4 - key // 4), 8 * (query % 4 - key % 4)) for key in range(16)]
                distance[layer, head] += np.sum(far * row) / 16
                renormalised[layer, head] += np.average(far, weights=row) / 16
    seen, _ = look(model.vit, image)
    assert np.ptp(distance) > 0.1
    np.testing.assert_allclose(seen.distance, distance, rtol=1e-4)
    np.testing.assert_allclose(look(model.vit, image, renormalise=True)[0].distance, renormalised, rtol=1e-4)
    np.testing.assert_allclose(seen.rollout.ravel(), rolled[0, 1:] / rolled[0, 1:].sum(), rtol=1e-4)
    np.testing.assert_allclose(seen.heads.reshape(2, 16), weights[-1, :, 0, 1:], rtol=1e-4)


def test_with_map_the_probe_is_the_output_token():
    model, image = make(pooling="map", num_register_tokens=2, initializer_range=0.3)
    kept = {}
    pool = model.vit.attention_pool
    hidden = run_layers(model.vit, image, lambda n, states, weights: kept.update({n: weights[0].mean(dim=0)}))
    seen, last = look(model.vit, image)
    with torch.no_grad():
        patches = model.vit.layernorm(hidden)[:, 2:]
        query = pool.attention.q_proj(pool.probe[0]).view(2, 1, 16)
        key = pool.attention.k_proj(patches[0]).view(16, 2, 16)
        probe = (torch.einsum("hqd,khd->hk", query, key) / 4).softmax(dim=-1)
    torch.testing.assert_close(last, hidden)
    np.testing.assert_allclose(seen.heads.reshape(2, 16), probe, rtol=1e-4)
    rolled = (kept[1] + torch.eye(18)) / 2 @ ((kept[0] + torch.eye(18)) / 2)
    expected = (probe.mean(dim=0) @ rolled[2:])[2:]
    np.testing.assert_allclose(seen.rollout.ravel(), expected / expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("registers", [0, 2])
def test_with_mean_pooling_all_patches_are_the_output(registers):
    """What the head reads is the mean of the patches, so the maps are means over their rows."""
    model, image = make(pooling="mean", num_register_tokens=registers, initializer_range=0.3)
    attentions = model.vit(image, output_attentions=True).attentions
    rolled = np.eye(16 + registers)
    for weights in attentions:
        mixed = weights[0].mean(dim=0).double().detach().numpy() + np.eye(16 + registers)
        rolled = mixed / mixed.sum(axis=1, keepdims=True) @ rolled
    seen, _ = look(model.vit, image)
    expected = rolled[registers:].mean(axis=0)[registers:]
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(seen.rollout.ravel(), expected / expected.sum(), rtol=1e-4)
    last = attentions[-1][0, :, registers:, registers:].mean(dim=1)
    np.testing.assert_allclose(seen.heads.reshape(2, 16), last.detach(), rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith(("resnet", "bit"))])
def test_layers_run_one_by_one_are_the_models_own_forward_pass(family):
    preset, changes = FAMILIES[family]
    torch.manual_seed(0)
    vit = from_preset(preset, ["a"], changes).eval().vit
    for size in (32, 64):
        image = torch.randn(2, 3, size, size)
        own = vit(image, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)
        seen = {}
        last = run_layers(vit, image, lambda n, states, weights, seen=seen: seen.update({n: (states, weights)}))
        torch.testing.assert_close(last, own.hidden_states[-1])
        for layer, (states, weights) in seen.items():
            torch.testing.assert_close(states, own.hidden_states[layer + 1])
            torch.testing.assert_close(weights, own.attentions[layer])


@pytest.mark.parametrize("changes", [{}, {"pooling": "map"}, {"position_embedding": "relative"}])
def test_one_layers_weights_exist_at_a_time(changes):
    model, image = make(num_hidden_layers=6, **changes)
    alive, most = [], []

    def note(module, args, output):
        alive.append(StorageWeakRef(output[1].untyped_storage()))  # a view of the weights would keep it too
        most.append(sum(not ref.expired() for ref in alive))

    for layer in model.vit.layers:
        layer.attention.register_forward_hook(note)
    seen = look(model.vit, image)
    assert len(most) == 6 and max(most) == 1
    assert all(ref.expired() for ref in alive) and seen  # what is kept of an image holds on to none


def test_sdpa_stays_what_it_was():
    model, image = make()
    assert model.config._attn_implementation == "sdpa"
    before = model(image).logits
    look(model.vit, image)
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(image).logits, before)


def test_an_image_that_patches_do_not_divide_is_named():
    model, _ = make()
    with pytest.raises(ValueError, match="33x32 pixels, which patches of 8x8 do not divide"):
        look(model.vit, torch.randn(1, 3, 33, 32))
