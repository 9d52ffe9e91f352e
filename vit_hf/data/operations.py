"""Operations on batches of uint8 images (B, H, W, C), each sample with an operation and a strength of its own, on any
device.

Each operation does what Pillow's does (the tests hold it against Pillow within one grey level), in integers where
Pillow uses integers, so that a CPU and a GPU give the same picture. Which sample gets which operation is known on the
host: samples of one kind are gathered, worked on together and put back, so that nothing is computed that is not used
and the host never waits for the device. This module must not know how operations are chosen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
TABLES = ("brightness", "contrast", "posterize", "solarize", "solarize_add", "invert", "autocontrast", "equalize")
OPERATIONS = ("identity", *GEOMETRIC, *TABLES, "color", "sharpness", "blur", "cutout")
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}


@dataclass
class Program:
    """What happens to each sample, one operation after the other.

    Args:
        operation: int (B, L), numbers of OPERATIONS.
        value: float (B, L), the operation's argument: a shear (pixels a pixel), a shift (whole pixels), degrees, the
            factor of Pillow's ImageEnhance (1 changes nothing), bits kept, a threshold or addition in grey levels, the
            standard deviation of a blur or half the side of a cutout (pixels).
        centre: float (B, L, 2) in [0, 1), the place (y, x) of a cutout.
    """

    operation: np.ndarray
    value: np.ndarray
    centre: np.ndarray


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def apply_program(pixels: Tensor, program: Program, fill: int = 0) -> Tensor:
    """Carries out a program: uint8 (B, H, W, C) -> the same shape; `fill` is the grey level of what is moved in."""
    families = (
        (GEOMETRIC, lambda group, name, value, centre: move(group, name, value, fill)),
        (TABLES, lambda group, name, value, centre: look_up(group, name, value)),
        (("color",), lambda group, name, value, centre: color(group, value)),
        (("sharpness",), lambda group, name, value, centre: sharpness(group, value)),
        (("blur",), lambda group, name, value, centre: blur(group, value)),
        (("cutout",), lambda group, name, value, centre: cutout(group, value, centre, fill)),
    )
    pixels = pixels.clone()  # what comes in may be the cache
    for layer in range(program.operation.shape[1]):
        operation = program.operation[:, layer]
        for names, function in families:
            rows = np.flatnonzero(np.isin(operation, [NUMBER[name] for name in names]))
            if len(rows):
                where = to_device(rows, pixels.device)
                name = np.array(OPERATIONS)[operation[rows]]
                group, value = pixels.index_select(0, where), program.value[rows, layer].astype(np.float64)
                pixels.index_copy_(0, where, function(group, name, value, program.centre[rows, layer]))
    return pixels


def blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend: first + factor x (second - first), clipped and cut off to whole grey levels: uint8."""
    first = first.float()
    return (first + factor * (second.float() - first)).clamp(0, 255).to(torch.uint8)


def factors(value: np.ndarray, pixels: Tensor) -> Tensor:
    """Strengths as float32 (G, 1, 1, 1) on the device of the pixels."""
    return to_device(value.astype(np.float32), pixels.device)[:, None, None, None]


def luma(pixels: Tensor) -> Tensor:
    """Grey levels of RGB images: int32 (B, H, W, 1). Source: ITU-R 601-2, in Pillow's 16-bit integers."""
    red, green, blue = (channel.int() for channel in pixels.unbind(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[..., None]


# --- geometry ---


def inverse_matrices(name: np.ndarray, value: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where each output pixel comes from, as Pillow's transform takes it: float64 (G, 6),
    x' = m0 x + m1 y + m2, y' = m3 x + m4 y + m5. Shears are about the upper left corner, rotations about the centre."""
    matrix = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (len(value), 1))
    for operation, column in (("shear_x", 1), ("shear_y", 3), ("translate_x", 2), ("translate_y", 5)):
        here = name == operation
        matrix[here, column] = value[here]
    here = name == "rotate"
    angle = -np.deg2rad(value[here])
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)
    y, x = height / 2, width / 2
    matrix[here] = np.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], axis=1)
    return matrix


def move(pixels: Tensor, name: np.ndarray, value: np.ndarray, fill: int) -> Tensor:
    """Shears, shifts (to the left and up for positive values) and rotates, nearest neighbour: uint8 (G, H, W, C)."""
    group, height, width, channels = pixels.shape
    m = inverse_matrices(name, value, height, width)
    m[:, 2] += 0.5 * (m[:, 0] + m[:, 1])  # the centre of a pixel, in 16 bits behind the point as Pillow counts
    m[:, 5] += 0.5 * (m[:, 3] + m[:, 4])
    m = to_device(np.floor(m * 65536 + 0.5).astype(np.int32), pixels.device)[:, :, None]
    y = torch.arange(height, dtype=torch.int32, device=pixels.device)
    x = torch.arange(width, dtype=torch.int32, device=pixels.device)
    source_x = ((m[:, 0] * x + m[:, 2])[:, None, :] + (m[:, 1] * y)[:, :, None]) >> 16
    source_y = ((m[:, 3] * x + m[:, 5])[:, None, :] + (m[:, 4] * y)[:, :, None]) >> 16
    # everything outside is read off a border of one pixel
    bordered = torch.nn.functional.pad(pixels, (0, 0, 1, 1, 1, 1), value=fill).view(-1, channels)
    source = source_y.clamp_(-1, height).mul_(width + 2).add_(source_x.clamp_(-1, width))
    first = torch.arange(group, dtype=torch.int32, device=pixels.device) * (height + 2) * (width + 2) + width + 3
    return bordered.index_select(0, source.add_(first[:, None, None]).flatten()).view_as(pixels)


# --- a grey level for each grey level ---


def fixed_tables(name: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The tables that do not depend on the picture: uint8 (G, 256)."""
    level = np.arange(256)[None]
    value = value[:, None]
    tables = {
        "brightness": lambda v: np.clip(level.astype(np.float32) * v.astype(np.float32), 0, 255),
        "posterize": lambda v: level & ~((1 << (8 - v.astype(int))) - 1),
        "solarize": lambda v: np.where(level < v, level, 255 - level),
        "solarize_add": lambda v: np.where(level < 128, np.clip(level + v, 0, 255), level),
        "invert": lambda v: 255 - level + 0 * v,
    }
    result = np.tile(level.astype(np.uint8), (len(name), 1))
    for operation, table in tables.items():
        here = name == operation
        if here.any():
            result[here] = table(value[here]).astype(np.uint8)
    return result


def look_up(pixels: Tensor, name: np.ndarray, value: np.ndarray) -> Tensor:
    """Brightness, contrast, posterize, solarize, solarize_add, invert, autocontrast, equalize: uint8 (G, H, W, C)."""
    channels = pixels.shape[3]
    table = to_device(fixed_tables(name, value), pixels.device)[:, None].repeat(1, channels, 1)
    level = torch.arange(256, device=pixels.device)
    from_picture = {"contrast": _contrast_table, "autocontrast": _autocontrast_table, "equalize": _equalize_table}
    for operation, make in from_picture.items():
        rows = np.flatnonzero(name == operation)
        if len(rows):
            where = to_device(rows, pixels.device)
            table.index_copy_(0, where, make(pixels.index_select(0, where), value[rows], level))
    first = torch.arange(0, table.numel(), 256, dtype=torch.int32, device=pixels.device).view(-1, 1, 1, channels)
    return table.flatten().index_select(0, (pixels + first).flatten()).view_as(pixels)


# Each of these: pixels (G, H, W, C), value (G,), level (256,) -> uint8 (G, C, 256).


def _contrast_table(pixels: Tensor, value: np.ndarray, level: Tensor) -> Tensor:
    mean = (luma(pixels).flatten(1).double().mean(1) + 0.5).floor()[:, None, None, None]
    return blend(mean, level, factors(value, pixels))[:, :, 0].expand(-1, pixels.shape[3], -1)


def _autocontrast_table(pixels: Tensor, value: np.ndarray, level: Tensor) -> Tensor:
    low, high = (side[..., None].double() for side in (pixels.amin((1, 2)), pixels.amax((1, 2))))
    scale = 255 / (high - low).clamp(min=1)
    stretched = (level * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, level.double()).to(torch.uint8)


def _equalize_table(pixels: Tensor, value: np.ndarray, level: Tensor) -> Tensor:
    flat = pixels.flatten(1, 2).transpose(1, 2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=pixels.device)
    counts.scatter_add_(2, flat, torch.ones((), dtype=torch.long, device=pixels.device).expand_as(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))  # of the brightest level there is
    step = (flat.shape[2] - last) // 255
    below = counts.cumsum(2) - counts
    equal = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    return torch.where(step > 0, equal, level).to(torch.uint8)


# --- neighbours and channels ---


def color(pixels: Tensor, value: np.ndarray) -> Tensor:
    """Saturation: 0 is grey, 1 the picture: uint8 (G, H, W, 3)."""
    return blend(luma(pixels), pixels, factors(value, pixels))


def sharpness(pixels: Tensor, value: np.ndarray) -> Tensor:
    """0 is smoothed by Pillow's 3x3 filter, 1 the picture; the outermost pixels stay: uint8 (G, H, W, C)."""
    x = pixels.short()
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    smooth = pixels.clone()
    smooth[:, 1:-1, 1:-1] = ((total + 6).float() * (1 / 13)).to(torch.uint8)  # total / 13, rounded
    return blend(smooth, pixels, factors(value, pixels))


def blur(pixels: Tensor, value: np.ndarray) -> Tensor:
    """Gaussian blur as Pillow has it, by three box blurs in each direction; value is the standard deviation in pixels:
    uint8 (G, H, W, C). Source: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", SSVM 2011."""
    variance = value**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    weights = np.clip(1 + (whole + part)[:, None] - np.abs(np.arange(-reach, reach + 1)), 0, 1)  # the last ones partly
    weights = to_device((weights / weights.sum(1, keepdims=True)).astype(np.float32), pixels.device)
    x = pixels
    for dim in (2, 2, 2, 1, 1, 1):
        size = x.shape[dim]
        at = torch.arange(size, device=x.device)
        total = torch.zeros(x.shape, device=x.device)
        for number in range(2 * reach + 1):
            total += weights[:, number, None, None, None] * x.index_select(
                dim, (at + number - reach).clamp(0, size - 1)
            )
        x = (total + 0.4999).to(
            torch.uint8
        )  # Pillow's integer weights add up to a little less than one: halves go down
    return x


def cutout(pixels: Tensor, value: np.ndarray, centre: np.ndarray, fill: int) -> Tensor:
    """Fills a square of side 2 x value about a place, cut at the border: uint8 (G, H, W, C). Source: arXiv 1708.04552."""
    half = np.floor(value)[:, None]
    middle = np.floor(centre * np.array(pixels.shape[1:3]))
    return torch.where(boxes(middle - half, middle + half, pixels), fill, pixels).to(torch.uint8)


def boxes(start: np.ndarray, end: np.ndarray, pixels: Tensor) -> Tensor:
    """Whether a pixel lies in its sample's box from start (G, 2) to before end (G, 2), as (y, x): bool (G, H, W, 1)."""
    edges = to_device(np.stack([start, end], axis=2).astype(np.int64), pixels.device)[:, :, :, None]
    inside = []
    for axis in (0, 1):
        at = torch.arange(pixels.shape[1 + axis], device=pixels.device)
        inside.append((at >= edges[:, axis, 0]) & (at < edges[:, axis, 1]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[..., None]
