# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""Where a token is: what each kind of position embedding computes, and how each is resized to another grid.

A grid is (rows, columns) of patches; tokens are in raster order, with `prefix` tokens (class token, registers) before
them. Pure functions of tensors: this module must not know about configurations or modules.
"""

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


def resize_position_embeddings(positions: Tensor, grid_size: Grid, new_grid_size: Grid) -> Tensor:
    """Resizes learned positions to another grid: (1, k + h*w, D) -> (1, k + new_h*new_w, D); the first k rows (class
    token) stay. Bicubic, and antialiased, which matters when the grid shrinks.

    Source: ViT paper (arXiv 2010.11929), section 3.2 ("2D interpolation of the pre-trained position embeddings").
    """
    if grid_size == new_grid_size:
        return positions
    num_patches = grid_size[0] * grid_size[1]
    extra, grid = positions[:, :-num_patches], positions[:, -num_patches:]
    grid = grid.transpose(1, 2).reshape(1, -1, *grid_size).float()
    grid = nn.functional.interpolate(grid, size=new_grid_size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((extra, grid.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


def join_axes(rows: Tensor, columns: Tensor) -> Tensor:
    """Positions of each axis, half the width each, put together: (1, h, D/2), (1, w, D/2) -> (1, h*w, D).

    Source: ViT paper, appendix D.4 ("2-dimensional positional embedding").
    """
    (_, height, half), width = rows.shape, columns.shape[1]
    parts = rows[:, :, None].expand(1, height, width, half), columns[:, None].expand(1, height, width, half)
    return torch.cat(parts, dim=-1).flatten(1, 2)


def sincos_position_embeddings(grid_size: Grid, hidden_size: int, learned_grid_size: Grid | None = None) -> Tensor:
    """Fixed positions (1, h*w, D): sine and cosine of the column, then of the row, at D/4 frequencies each, from 1 to
    1/10,000.

    Args:
        learned_grid_size: the grid that the other weights have learned, None: this one. Its places are whole numbers,
            and the centres of the patches of this grid lie between them, as where learned positions are resized:
            place j of n is (j + 1/2) * learned / n - 1/2.

    Source: arXiv 2205.01580, section 3; google-research/big_vision, posemb_sincos_2d. Another grid: ViT paper (arXiv
    2010.11929), section 3.2 (interpolation "according to their location in the original image").
    """
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / max(quarter - 1, 1))
    rows, columns = (
        ((torch.arange(side, dtype=torch.float64) + 0.5) * (learned / side) - 0.5)[:, None] * frequencies
        for side, learned in zip(grid_size, learned_grid_size or grid_size)
    )
    rows = rows[:, None].expand(*grid_size, quarter)
    columns = columns[None].expand(*grid_size, quarter)
    table = torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), dim=-1)
    return table.reshape(1, -1, 4 * quarter).float()


def relative_table_rows(grid_size: Grid, prefix: int) -> int:
    """Rows of a table of relative biases: one an offset, and three more where there are prefix tokens."""
    return (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1) + (3 if prefix else 0)


def relative_position_index(grid_size: Grid, prefix: int) -> Tensor:
    """For each pair (query, key) its row in the table of biases: int64 (N, N) with N = prefix + h*w.

    Patches: the row of their 2-D offset. The last three rows are for a prefix token that looks at a patch, a patch
    that looks at a prefix token, and prefix tokens among themselves.

    Source: Swin, arXiv 2103.14030, equation 4; the three rows as in BEiT, arXiv 2106.08254.
    """
    rows, columns = grid_size
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    offset_y = y[:, None] - y[None] + rows - 1
    offset_x = x[:, None] - x[None] + columns - 1
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index = torch.full((prefix + rows * columns, prefix + rows * columns), offsets + 2)
    index[:prefix, prefix:] = offsets
    index[prefix:, :prefix] = offsets + 1
    index[prefix:, prefix:] = offset_y * (2 * columns - 1) + offset_x
    return index


def resize_relative_table(table: Tensor, grid_size: Grid, new_grid_size: Grid) -> Tensor:
    """Resizes a table of relative biases (rows, heads) to another grid's, bicubic over the 2-D offsets; the three rows
    of prefix tokens stay. Source: Swin, arXiv 2103.14030, section 3.2."""
    if grid_size == new_grid_size:
        return table
    (height, width), (new_height, new_width) = grid_size, new_grid_size
    offsets = (2 * height - 1) * (2 * width - 1)
    grid = resize_position_embeddings(
        table[None, :offsets], (2 * height - 1, 2 * width - 1), (2 * new_height - 1, 2 * new_width - 1)
    )
    return torch.cat((grid[0], table[offsets:]))
