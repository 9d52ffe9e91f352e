"""Where a token is: each kind of position embedding against what it says, and how each goes to another grid."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vit_hf.models import ViTConfig
from vit_hf.models.positions import (
    join_axes,
    relative_position_index,
    resize_position_embeddings,
    resize_relative_table,
    sincos_position_embeddings,
)
from vit_hf.models.presets import from_preset
from vit_hf.models.transfer import for_new_labels

# --- position embeddings of another grid ---


def test_positions_of_the_same_grid_stay():
    positions = torch.randn(1, 1 + 12, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_position_embeddings(positions, (3, 4), (3, 4)), positions)


@pytest.mark.parametrize("grid, new_grid", [((4, 4), (7, 7)), ((8, 8), (3, 3)), ((3, 5), (6, 4)), ((4, 6), (6, 4))])
def test_resized_positions_agree_with_pillow(grid, new_grid):
    """Pillow's bicubic filter, which is antialiased too, on every channel; the class token's row is untouched."""
    positions = torch.randn(1, 1 + grid[0] * grid[1], 4, generator=torch.Generator().manual_seed(0))
    found = resize_position_embeddings(positions, grid, new_grid)
    assert found.shape == (1, 1 + new_grid[0] * new_grid[1], 4)
    assert torch.equal(found[:, 0], positions[:, 0])
    for channel in range(4):
        plane = Image.fromarray(positions[0, 1:, channel].reshape(grid).numpy())
        expected = np.asarray(plane.resize(new_grid[::-1], Image.Resampling.BICUBIC))
        np.testing.assert_allclose(found[0, 1:, channel].reshape(new_grid), expected, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 1])
def test_constant_positions_stay_constant_and_a_ramp_stays_a_ramp(classes):
    """Doubling a linear ramp 0..7 gives (x + 0.5) / 2 - 0.5 away from the borders, along its own axis only."""
    extra = torch.full((1, classes, 2), 9.0)
    rows = torch.arange(8.0)[:, None].expand(8, 8).reshape(1, 64, 1)
    positions = torch.cat((extra, torch.cat((rows, torch.full((1, 64, 1), 3.0)), dim=2)), dim=1)
    found = resize_position_embeddings(positions, (8, 8), (16, 16))
    assert torch.equal(found[:, :classes], extra)
    ramp, constant = found[0, classes:].reshape(16, 16, 2).unbind(-1)
    torch.testing.assert_close(constant, torch.full((16, 16), 3.0))
    expected = ((torch.arange(16.0) + 0.5) / 2 - 0.5)[4:12, None].expand(8, 16)
    torch.testing.assert_close(ramp[4:12], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resized_positions_keep_their_type(dtype):
    assert resize_position_embeddings(torch.zeros(1, 17, 4, dtype=dtype), (4, 4), (5, 5)).dtype == dtype


# --- fixed, by axis, relative ---


def test_sincos_written_out():
    """arXiv 2205.01580: sine and cosine of x, then of y, at width/4 frequencies from 1 to 1/10,000."""
    rows, columns, width = 3, 4, 24
    table = sincos_position_embeddings((rows, columns), width)
    assert table.shape == (1, 12, 24) and table.dtype == torch.float32
    for y, x in itertools.product(range(rows), range(columns)):
        omega = [1 / 10_000 ** (k / 5) for k in range(6)]
        expected = [math.sin(x * w) for w in omega] + [math.cos(x * w) for w in omega]
        expected += [math.sin(y * w) for w in omega] + [math.cos(y * w) for w in omega]
        np.testing.assert_allclose(table[0, y * columns + x], expected, atol=1e-6)


def test_sincos_of_the_learned_grid_itself_is_the_same_to_the_bit():
    for grid in ((3, 4), (14, 14), (7, 24)):
        assert torch.equal(sincos_position_embeddings(grid, 16, grid), sincos_position_embeddings(grid, 16))


def rms(values):
    return values.square().mean().sqrt().item()


@pytest.mark.parametrize(
    "grid, new_grid", [((14, 14), (24, 24)), ((14, 14), (7, 7)), ((4, 4), (8, 8)), ((6, 4), (9, 10))]
)
@pytest.mark.parametrize("mode, bound", [("bicubic", 0.04), ("bilinear", 0.06)])
def test_sincos_of_another_grid_is_near_the_resized_table(grid, new_grid, mode, bound):
    """The authors interpolate a learned table (ViT paper, section 3.2): the fixed positions at the places between are
    close to that, and those that count on are not. (Bilinear smooths more where the grid shrinks.)"""
    table = sincos_position_embeddings(grid, 64)
    planes = table.transpose(1, 2).reshape(1, 64, *grid)
    resized = torch.nn.functional.interpolate(planes, new_grid, mode=mode, antialias=True).flatten(2).transpose(1, 2)
    found = sincos_position_embeddings(new_grid, 64, grid)
    assert rms(found - resized) < bound  # of values between -1 and 1
    assert 0.3 < rms(sincos_position_embeddings(new_grid, 64) - resized)


def test_sincos_keeps_a_place_of_the_image():
    """Every third patch of a grid three times as fine has the centre of a patch of the learned grid."""
    coarse, fine = sincos_position_embeddings((3, 4), 16), sincos_position_embeddings((9, 12), 16, (3, 4))
    torch.testing.assert_close(fine.reshape(9, 12, 16)[1::3, 1::3].reshape(1, 12, 16), coarse, rtol=0, atol=1e-6)


def test_fine_tuned_sincos_keeps_the_places_of_pretraining_at_every_size(tmp_path):
    """At 64 pixels, at 96 from there, and back at 32: each the same as the pretrained model that interpolates."""
    changes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    pretrained = from_preset("vit-demo-patch8-32", ["a", "b"], changes | {"position_embedding": "sincos_2d"}).eval()
    model = pretrained
    for size, learned in ((64, [4, 4]), (96, [4, 4]), (32, None)):
        model = for_new_labels(model, ["a", "b"], {"image_size": size}, keep_head=True)
        assert model.config.learned_grid_size == learned
        model.save_pretrained(tmp_path / str(size))
        model = type(model).from_pretrained(tmp_path / str(size))
        pixel_values = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = pretrained(pixel_values, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(model(pixel_values).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes, message", [
    (dict(learned_grid_size=[4, 4]), "goes with position_embedding sincos_2d"),
    (dict(position_embedding="sincos_2d", learned_grid_size=[4]), "is not .rows, columns."),
    (dict(position_embedding="sincos_2d", learned_grid_size=[0, 4]), "is not .rows, columns."),
])  # fmt: skip
def test_a_wrong_learned_grid_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(hidden_size=16, num_attention_heads=2, **changes)


def test_join_axes():
    rows, columns = torch.randn(1, 2, 3), torch.randn(1, 4, 3)
    joined = join_axes(rows, columns)
    for y, x in itertools.product(range(2), range(4)):
        assert torch.equal(joined[0, y * 4 + x], torch.cat((rows[0, y], columns[0, x])))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_relative_index_has_a_row_for_each_offset(prefix):
    rows, columns = 3, 4
    index = relative_position_index((rows, columns), prefix)
    assert index.shape == (prefix + 12, prefix + 12) and index.dtype == torch.int64
    met = {}
    for i, j in itertools.product(range(12), range(12)):
        offset = (i // columns - j // columns, i % columns - j % columns)
        assert met.setdefault(offset, index[prefix + i, prefix + j].item()) == index[prefix + i, prefix + j]
    assert sorted(met.values()) == list(range(5 * 7))  # one each, none unused
    if prefix:
        assert (index[:prefix, prefix:] == 35).all() and (index[prefix:, :prefix] == 36).all()
        assert (index[:prefix, :prefix] == 37).all()


def test_resized_relative_table_keeps_sign_zero_and_the_rows_of_prefix_tokens():
    """A bias that grows with the offset along the height: doubled resolution halves its slope."""
    offsets = torch.arange(-7.0, 8.0)
    table = torch.cat((offsets[:, None].expand(15, 15).reshape(-1, 1), torch.tensor([[7.0], [8.0], [9.0]])))
    assert torch.equal(resize_relative_table(table, (8, 8), (8, 8)), table)
    found = resize_relative_table(table, (8, 8), (16, 16))
    assert torch.equal(found[-3:], table[-3:])
    grid = found[:-3, 0].reshape(31, 31)
    assert abs(grid[15].max()) < 1e-5  # offset zero stays where it is
    torch.testing.assert_close(grid, -grid.flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(grid[16, 0] - grid[15, 0], torch.tensor(15 / 31), rtol=1e-3, atol=0)
