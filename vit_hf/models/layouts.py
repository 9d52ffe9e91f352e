# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""What the conversions of convert.py share: tensors of another layout into a model of ours, with its sizes read off
them, and refusals that name them. This module must not know timm's or Google's names."""

import math
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .configuration_vit import ViTConfig
from .modeling_vit import ViTForImageClassification
from .presets import make_config

Layout = dict[str, list[str]]
EPS = 1e-6  # of LayerNorm in timm's and Google's code


def make_layout(ours: Iterable[str], patterns: tuple) -> Layout:
    """{name there: [our names]}: which of our tensors, put together along dimension 0, a tensor of the source is. The
    `patterns` make its name of ours, replaced one after the other."""
    layout: Layout = {}
    for name in ours:
        there = name
        for pattern, replacement in patterns:
            there = re.sub(pattern, replacement, there)
        layout.setdefault(there, []).append(name)
    return layout


def fill_model(fields: dict[str, Any], tensors: dict[str, Tensor], patterns: tuple) -> ViTForImageClassification:
    """A model with these weights. Raises ValueError for tensors that are missing, extra or misshaped."""
    model = ViTForImageClassification(make_config(ViTConfig, fields | {"layer_norm_eps": EPS}))
    expected, weights, misshaped = model.state_dict(), {}, []
    layout = make_layout(expected, patterns)
    for there, here in layout.items():
        lengths = [len(expected[name]) for name in here]
        shape = (sum(lengths), *expected[here[0]].shape[1:])
        if there in tensors and tensors[there].shape == shape:
            weights |= dict(zip(here, tensors[there].split(lengths)))
        elif there in tensors:
            misshaped.append(f"{there} {tuple(tensors[there].shape)} instead of {shape}")
    missing, unexpected = ([name for name in a if name not in b] for a, b in ((layout, tensors), (tensors, layout)))
    kinds = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    if reasons := [f"{what} {listed(names)}" for what, names in kinds.items() if names]:
        raise ValueError(f"its tensors are not those of a ViT of these sizes: {'; '.join(reasons)}")
    model.load_state_dict(weights)
    return model.eval()


def find_grid(name: str, table: Any, prefix: int, token: list[int], size: list[int]) -> list[int]:
    """Rows and columns of patches of `token` pixels: those of an image of this size or, where it is [0, 0], the one
    square that fits the positions (1, N, D) or (1, prefix + N, D). Raises ValueError where nothing fits."""
    shape = () if table is None else tuple(table.shape)
    rows = shape[1] if len(shape) == 3 else 0
    if any(size):
        grid = [size[0] // token[0], size[1] // token[1]]
        if shape and rows - grid[0] * grid[1] not in (0, prefix):
            raise ValueError(f"{name} has the shape {shape}, and {size[0]}x{size[1]} pixels make a grid of {grid}")
        return grid
    sides = {math.isqrt(count) for count in (rows, rows - prefix) if count > 0 and math.isqrt(count) ** 2 == count}
    if len(sides) != 1:
        raise ValueError(f"{name} has the shape {shape}, no square grid; a config.json must tell input_size")
    return [*sides, *sides]


def need_tensors(tensors: dict[str, Any], whose: str, dimensions: dict[str, int]) -> None:
    """Raises ValueError unless the tensors that sizes are read off are there with so many dimensions."""
    for name, number in dimensions.items():
        if name not in tensors:
            raise ValueError(f"no tensor {name}, so it is no ViT of {whose}; it has {listed(sorted(tensors))}")
        if tensors[name].ndim != number:
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}, not {number} dimensions")


def label_fields(num_labels: int, names: list[str] | dict[str, str] | None) -> dict[str, Any]:
    """Classes in a configuration; LABEL_i where there are no names. Raises ValueError for too many or too few."""
    names = [names[index] for index in sorted(names, key=int)] if isinstance(names, dict) else names
    if not names or not num_labels:
        return {"num_labels": num_labels}
    if len(names) != num_labels:
        raise ValueError(f"label_names has {len(names)} names, the head {num_labels} classes")
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def listed(names: list[str]) -> str:
    """At most five of them, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def count(names: Iterable[str], pattern: str) -> int:
    """Distinct values of the pattern's group: layers, stages, units."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def size_of(tensors: dict[str, Any], name: str, dimension: int) -> int:
    """0 where there is no such tensor or dimension."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[dimension] if len(shape) > dimension else 0


def side_of(size: Iterable[int]) -> int | list[int]:
    """A configuration's form of (height, width)."""
    height, width = size
    return height if height == width else [height, width]
