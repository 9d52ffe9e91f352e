"""Every switch of ViTConfig does what it says: each test here fails if its switch does nothing."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vit_hf.models import ViTConfig, ViTForImageClassification
from vit_hf.models.configuration_vit import CHOICES

GRID = (3, 4)
TINY = dict(
    image_size=[12, 16], patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=32, num_labels=5,
)  # fmt: skip


def make(**changes) -> ViTForImageClassification:
    """Random parameters everywhere, in fp64, so that equal means equal."""
    model = ViTForImageClassification(ViTConfig(**{**TINY, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def pixels(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shuffled(images: torch.Tensor) -> torch.Tensor:
    """The same patches in another order."""
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (B, C, N, P, P)
    patches = patches[:, :, torch.randperm(12, generator=torch.Generator().manual_seed(2))]
    rows = patches.reshape(len(images), 3, *GRID, 4, 4).permute(0, 1, 2, 4, 3, 5)
    return rows.reshape(images.shape)


@torch.no_grad()
def logits(model, images=None, **kwargs):
    return model(pixels() if images is None else images, **kwargs).logits


# --- position embeddings ---


@pytest.mark.parametrize("kind, pooling", [*itertools.product(CHOICES["position_embedding"], CHOICES["pooling"])])
def test_the_order_of_patches_matters_except_with_none(kind, pooling):
    model = make(position_embedding=kind, pooling=pooling)
    change = (logits(model) - logits(model, shuffled(pixels()))).abs().max().item()
    assert change < 1e-12 if kind == "none" else change > 1e-3


@pytest.mark.parametrize("kind", CHOICES["position_embedding"])
def test_what_each_kind_stores_and_adds(kind):
    model = make(position_embedding=kind, pooling="mean")
    names = {name for name in model.state_dict() if "position" in name}
    tables = {f"vit.layers.{layer}.attention.relative_position_bias_table" for layer in range(2)}
    assert (
        names
        == {
            "learned_1d": {"vit.embeddings.position_embeddings"},
            "learned_2d": {"vit.embeddings.row_position_embeddings", "vit.embeddings.column_position_embeddings"},
            "sincos_2d": set(),
            "relative": tables,
            "none": set(),
        }[kind]
    )
    embeddings = model.vit.embeddings
    with torch.no_grad():
        added = embeddings(pixels(), GRID) - embeddings.patch_embeddings(pixels())
    if kind in ("relative", "none"):
        assert not added.any()
    else:
        torch.testing.assert_close(added[0], added[1])  # the same for every image
        assert all((added[0, i] - added[0, j]).abs().max() > 1e-3 for i, j in itertools.combinations(range(12), 2))


def test_learned_2d_is_half_a_row_and_half_a_column():
    embeddings = make(position_embedding="learned_2d").vit.embeddings
    with torch.no_grad():
        added = (embeddings(pixels(), GRID)[:, 1:] - embeddings.patch_embeddings(pixels()))[0]
    for y, x in itertools.product(*map(range, GRID)):
        expected = torch.cat((embeddings.row_position_embeddings[0, y], embeddings.column_position_embeddings[0, x]))
        torch.testing.assert_close(added[y * 4 + x], expected)


def test_relative_bias_written_out():
    """One head's attention with the bias of each pair looked up by its offset, against the model's."""
    model = make(position_embedding="relative", pooling="mean")
    attention = model.vit.layers[0].attention
    tokens = torch.randn(1, 12, 24, dtype=torch.float64)
    with torch.no_grad():
        _, found = attention(tokens, True, (model.vit.relative_position_index, GRID))
        query, key = (attention.split_heads(p(tokens))[0] for p in (attention.q_proj, attention.k_proj))
        for head in range(3):
            bias = torch.empty(12, 12, dtype=torch.float64)
            for i, j in itertools.product(range(12), range(12)):
                dy, dx = i // 4 - j // 4, i % 4 - j % 4
                bias[i, j] = attention.relative_position_bias_table[(dy + 2) * 7 + (dx + 3), head]
            expected = (query[head] @ key[head].T / math.sqrt(8) + bias).softmax(-1)
            torch.testing.assert_close(found[0, head], expected, rtol=0, atol=1e-6)  # the softmax is in fp32


def test_relative_bias_tells_shifts_apart_from_places():
    """Of a translation-invariant kind: the bias from a patch to its right neighbour is the same everywhere, and prefix
    tokens have biases of their own."""
    model = make(position_embedding="relative", num_register_tokens=1)
    bias = model.vit.layers[0].attention.position_bias(model.vit.relative_position_index, GRID)[0]
    neighbours = torch.stack([bias[:, 2 + y * 4 + x, 2 + y * 4 + x + 1] for y in range(3) for x in range(3)])
    assert (neighbours == neighbours[0]).all()
    table = model.vit.layers[0].attention.relative_position_bias_table
    assert len(table) == 5 * 7 + 3
    for rows, columns, row in ((slice(0, 2), slice(2, None), -3), (slice(2, None), slice(0, 2), -2)):
        assert (bias[:, rows, columns] == table[row][:, None, None]).all()
    assert (bias[:, :2, :2] == table[-1][:, None, None]).all()


def test_relative_refuses_flash_attention():
    message = "flash_attention_2 takes no bias, which position_embedding relative is; allowed are sdpa, eager, flex_attention"
    config = ViTConfig(**TINY, position_embedding="relative")
    with pytest.raises(ValueError, match=message):
        ViTForImageClassification._from_config(config, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=message):
        make(position_embedding="relative").set_attn_implementation("flash_attention_2")


# --- tokens, pooling, head ---


def test_poolings_read_different_things():
    outputs = {}
    for pooling in CHOICES["pooling"]:
        model = make(pooling=pooling)
        encoded = model.vit(pixels())
        outputs[pooling] = encoded
        assert encoded.last_hidden_state.shape[1] == 12 + (pooling == "cls")
    torch.testing.assert_close(outputs["cls"].pooler_output, outputs["cls"].last_hidden_state[:, 0])
    torch.testing.assert_close(outputs["mean"].pooler_output, outputs["mean"].last_hidden_state.mean(1))
    tokens, pool = outputs["map"].last_hidden_state, make(pooling="map").vit.attention_pool
    assert not torch.allclose(outputs["map"].pooler_output, tokens.mean(1), atol=1e-3)
    # written out: softmax(q k / sqrt(d)) v for the one probe, and an MLP on top
    query, key, value = (
        linear(states).reshape(*states.shape[:2], 3, 8)
        for linear, states in zip(
            (pool.attention.q_proj, pool.attention.k_proj, pool.attention.v_proj), (pool.probe, tokens, tokens)
        )
    )
    weights = (torch.einsum("xqhd,bnhd->bhqn", query, key) / math.sqrt(8)).softmax(-1)
    read = pool.attention.o_proj(torch.einsum("bhqn,bnhd->bqhd", weights, value).flatten(2))[:, 0]
    normed = nn.functional.layer_norm(read, (24,), pool.layernorm.weight, pool.layernorm.bias, 1e-12)
    expected = read + pool.mlp.fc2(nn.functional.gelu(pool.mlp.fc1(normed)))
    torch.testing.assert_close(outputs["map"].pooler_output, expected)


def test_fc_norm_norms_the_mean():
    model = make(pooling="mean", fc_norm=True)
    encoded = model.vit(pixels(), output_hidden_states=True)
    torch.testing.assert_close(encoded.last_hidden_state, encoded.hidden_states[-1])
    torch.testing.assert_close(encoded.pooler_output, model.vit.layernorm(encoded.hidden_states[-1].mean(1)))
    assert not torch.allclose(logits(model), logits(make(pooling="mean")), atol=1e-3)


@pytest.mark.parametrize("pooling", CHOICES["pooling"])
def test_registers_take_part_in_attention_and_not_in_pooling(pooling):
    model = make(pooling=pooling, num_register_tokens=3)
    encoded = model.vit(pixels())
    first = int(pooling == "cls")
    assert encoded.last_hidden_state.shape[1] == 12 + first + 3
    before = logits(model)
    with torch.no_grad():
        model.vit.embeddings.register_tokens[0, 1] *= -1
    assert (logits(model) - before).abs().max() > 1e-4
    if pooling == "mean":
        patches = model.vit(pixels()).last_hidden_state[:, 3:]
        torch.testing.assert_close(model.vit(pixels()).pooler_output, patches.mean(1))
    # they stand between the class token and the patches, without a position
    embedded = model.vit.embeddings(pixels(), GRID)
    torch.testing.assert_close(embedded[0, first : first + 3], model.vit.embeddings.register_tokens[0])


def test_registers_start_different_from_each_other():
    registers = ViTForImageClassification(ViTConfig(**TINY, num_register_tokens=2)).vit.embeddings.register_tokens
    assert not torch.equal(registers[0, 0], registers[0, 1])


def test_head_bias_init():
    model = ViTForImageClassification(ViTConfig(**TINY, head_bias_init=-6.9))
    assert (model.classifier.bias == -6.9).all()
    assert (ViTForImageClassification(ViTConfig(**TINY)).classifier.bias == 0).all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"position_embedding": "relative", "num_register_tokens": 2}, {"qk_norm": True, "layer_scale_init": 0.1}],
)
def test_a_class_token_is_all_that_the_last_layer_computes(changes):
    """The same logits and gradients as with every token, for fewer operations."""
    model, results = make(**changes), []
    for every_token in (True, False):
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            output = model(pixels(), output_hidden_states=every_token)
        output.logits.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((output.logits.detach(), gradients, counter.get_total_flops()))
    (expected, full, more), (found, short, fewer) = results
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for name in full:
        torch.testing.assert_close(short[name], full[name], rtol=1e-7, atol=1e-9)
    assert fewer < 0.75 * more


def test_a_model_without_weights_gives_shapes():
    """On the meta device, as tools do that plan where a model goes; autocast knows no such device."""
    with torch.device("meta"):
        output = ViTForImageClassification(ViTConfig(**TINY, pooling="map"))(torch.empty(2, 3, 12, 16))
    assert output.logits.shape == (2, 5)


# --- inside a layer ---


def test_qk_norm_takes_the_length_out_of_queries_and_keys():
    for qk_norm, grows in ((True, False), (False, True)):
        model = make(qk_norm=qk_norm)
        before = logits(model)
        with torch.no_grad():
            for layer in model.vit.layers:
                layer.attention.q_proj.weight *= 50
                layer.attention.q_proj.bias *= 50
        assert ((logits(model) - before).abs().max() > 1e-3) == grows
    assert {"q_norm", "k_norm"} <= dict(make(qk_norm=True).vit.layers[0].attention.named_children()).keys()
    assert make(qk_norm=True).vit.layers[0].attention.q_norm.weight.shape == (8,)  # over a head's width


def test_layer_scale_starts_at_its_value_and_scales_the_branches():
    fresh = ViTForImageClassification(ViTConfig(**TINY, layer_scale_init=1e-4))
    scales = [p for name, p in fresh.named_parameters() if name.endswith("gamma")]
    assert len(scales) == 4 and all((scale == 1e-4).all() for scale in scales)
    model = make(layer_scale_init=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.zero_()
    encoded = model.vit(pixels(), output_hidden_states=True)
    torch.testing.assert_close(encoded.hidden_states[-1], encoded.hidden_states[0])  # both branches are off


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_dropouts_act_in_training_alone(name):
    model = make(**{name: 0.5})
    assert torch.equal(logits(model), logits(make()))
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    assert not torch.allclose(first, logits(model), atol=1e-4)
    torch.manual_seed(0)
    torch.testing.assert_close(logits(model), first)


# --- stems ---


def test_stems_give_the_same_grid():
    width = dict(hidden_size=96, image_size=32)
    for changes in (
        dict(patch_size=8),
        dict(patch_size=8, stem="conv"),
        dict(patch_size=2, stem="hybrid_resnet", stem_depths=[1], stem_width=32),
        dict(patch_size=1, stem="hybrid_resnet", stem_depths=[1, 1], stem_width=32),
    ):
        model = ViTForImageClassification(ViTConfig(**{**TINY, **width, **changes}))
        assert model.vit(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 17, 96)


def test_stage_4_gives_a_fourth_of_the_tokens_of_the_extended_stage_3():
    """ViT paper, section 4.1: "a sequence four times longer"; with as many blocks."""
    grids = [
        ViTConfig(image_size=224, patch_size=1, stem="hybrid_resnet", stem_depths=depths).grid_size
        for depths in (None, [3, 4, 9], [3, 4, 6, 3])
    ]
    assert grids == [(14, 14), (14, 14), (7, 7)]


# --- the random start ---


def test_paper_initialiser():
    """Xavier for attention and MLP, LeCun for the patches, zero for class token, classifier and biases."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=192, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=768, num_labels=10, head_hidden_size=192, initializer="paper",
    )  # fmt: skip
    model = ViTForImageClassification(config)
    layer, embeddings = model.vit.layers[0], model.vit.embeddings
    for linear in (layer.attention.q_proj, layer.attention.o_proj, layer.mlp.fc1, layer.mlp.fc2):
        limit = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max().item() == pytest.approx(limit, rel=1e-3)
        assert linear.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    for weight, fan_in in ((embeddings.patch_embeddings.projection.weight, 192), (model.pre_logits[0].weight, 192)):
        assert weight.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.02)
    assert embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.05)
    assert not embeddings.cls_token.any() and not model.classifier.weight.any()
    assert not layer.attention.q_proj.bias.any() and 0 < layer.mlp.fc1.bias.abs().max() < 1e-5
    plain = ViTForImageClassification(ViTConfig(**TINY))
    assert plain.vit.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert plain.classifier.weight.any()


def test_paper_initialiser_starts_each_unit_of_a_hybrid_as_its_shortcut():
    config = ViTConfig(
        image_size=32, patch_size=1, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32,
        stem="hybrid_resnet", stem_depths=[2], stem_width=32, initializer="paper",
    )  # fmt: skip
    unit = ViTForImageClassification(config).vit.embeddings.patch_embeddings.backbone.stages[0][1]
    states = torch.randn(1, 128, 8, 8).relu()
    torch.testing.assert_close(unit(states), states)


def test_the_start_does_not_make_a_model_of_another_kind():
    """initializer and head_bias_init are gone once it is trained: such a model is still transformers' own."""
    assert ViTConfig(**TINY, initializer="paper", head_bias_init=-1.0).is_stock
    for field in (dict(qk_norm=True), dict(layer_scale_init=1.0), dict(num_register_tokens=1), dict(pooling="map")):
        config = ViTConfig(**TINY, **field)
        assert not config.is_stock
        with pytest.raises(ValueError, match=next(iter(field))):
            config.to_stock()


def test_initialisation_leaves_loaded_weights_alone(tmp_path):
    """A folder without its head: everything else as saved, the head as `initializer` says."""
    from safetensors.torch import load_file, save_file

    config = ViTConfig(**TINY, initializer="paper", layer_scale_init=0.5, position_embedding="sincos_2d")
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    for name, tensor in model.vit.state_dict().items():
        assert torch.equal(loaded.vit.state_dict()[name], tensor), name
    assert not loaded.classifier.weight.any() and not loaded.classifier.bias.any()
    table = loaded.vit.embeddings.sincos_position_embeddings  # not in the file: computed again
    torch.testing.assert_close(table, model.vit.embeddings.sincos_position_embeddings)
