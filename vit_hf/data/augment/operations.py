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
TABLES = ("posterize", "solarize", "solarize_add", "invert")
ENHANCEMENTS = ("brightness", "contrast", "color", "sharpness")
# samples are sorted by these numbers, so operations that are worked on together stand side by side
OPERATIONS = ("identity", *GEOMETRIC, *TABLES, *ENHANCEMENTS, "autocontrast", "equalize", "blur", "cutout")
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}


@dataclass
class Program:
    """What happens to each sample, one operation after the other.

    Args:
        operation: int (B, L), numbers of OPERATIONS.
        value: float (B, L), the operation's argument: a shear (pixels a pixel), a shift (pixels), degrees, the
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


def apply_program(pixels: Tensor, program: Program, fill: int | Tensor = 0) -> Tensor:
    """Carries out a program: uint8 (B, H, W, C) -> the same shape; `fill` is the grey level of what is moved in, or one
    for each channel, uint8 (C,) on the device."""
    families = [
        (("identity",), lambda group, operation, value, centre: group),
        (GEOMETRIC, lambda group, operation, value, centre: move(group, operation, value, fill)),
        (TABLES, lambda group, operation, value, centre: look_up(group, operation, value)),
        (ENHANCEMENTS, lambda group, operation, value, centre: enhance(group, operation, value)),
        (("autocontrast",), lambda group, operation, value, centre: autocontrast(group)),
        (("equalize",), lambda group, operation, value, centre: equalize(group)),
        (("blur",), lambda group, operation, value, centre: blur(group, value)),
        (("cutout",), lambda group, operation, value, centre: cutout(group, value, centre, fill)),
    ]
    place = np.arange(len(pixels))  # of each sample in `pixels`
    for layer in range(program.operation.shape[1]):
        order = np.argsort(program.operation[:, layer], kind="stable")
        operation, value, centre = (part[order, layer] for part in (program.operation, program.value, program.centre))
        pixels = pixels.index_select(0, to_device(place[order], pixels.device))
        place[order] = np.arange(len(order))
        changed = []
        for names, function in families:
            first, last = np.searchsorted(operation, (NUMBER[names[0]], NUMBER[names[-1]] + 1))
            if first < last:
                here = slice(first, last)
                changed.append(function(pixels[here], operation[here], value[here].astype(np.float64), centre[here]))
        pixels = torch.cat(changed)
    return pixels.index_select(0, to_device(place, pixels.device))


def inverse_matrices(operation: np.ndarray, value: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where each output pixel comes from, as Pillow's transform takes it: float64 (G, 6),
    x' = m0 x + m1 y + m2, y' = m3 x + m4 y + m5. Shears are about the upper left corner, rotations about the centre."""
    matrix = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (len(value), 1))
    for name, column in (("shear_x", 1), ("shear_y", 3), ("translate_x", 2), ("translate_y", 5)):
        here = operation == NUMBER[name]
        matrix[here, column] = value[here]
    here = operation == NUMBER["rotate"]
    angle = -np.deg2rad(value[here])
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)
    y, x = height / 2, width / 2
    matrix[here] = np.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], axis=1)
    return matrix


def move(pixels: Tensor, operation: np.ndarray, value: np.ndarray, fill: int | Tensor) -> Tensor:
    """Shears, shifts (to the left and up for positive values) and rotates, nearest neighbour: uint8 (G, H, W, C)."""
    group, height, width, channels = pixels.shape
    m = inverse_matrices(operation, value, height, width)
    m[:, 2] += 0.5 * (m[:, 0] + m[:, 1])  # the centre of a pixel, in 16 bits behind the point as Pillow counts
    m[:, 5] += 0.5 * (m[:, 3] + m[:, 4])
    m = np.floor(m * 65536 + 0.5).astype(np.int32)[:, :, None]
    x, y = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)
    parts = (m[:, 0] * x + m[:, 2], m[:, 1] * y, m[:, 3] * x + m[:, 5], m[:, 4] * y)  # (G, W), (G, H), ...
    along_x, down_x, along_y, down_y = to_device(np.concatenate(parts, axis=1), pixels.device).split(
        (width, height, width, height), dim=1
    )
    source_x = (along_x[:, None, :] + down_x[:, :, None]).bitwise_right_shift_(16).clamp_(-1, width)
    source_y = (along_y[:, None, :] + down_y[:, :, None]).bitwise_right_shift_(16).clamp_(-1, height)
    # everything outside is read off a border of one pixel
    bordered = pixels.new_empty(group, height + 2, width + 2, channels)
    bordered[:] = fill
    bordered[:, 1:-1, 1:-1] = pixels
    bordered = bordered.view(-1, channels)
    first = torch.arange(group, dtype=torch.int32, device=pixels.device) * ((height + 2) * (width + 2)) + width + 3
    source = source_y.mul_(width + 2).add_(source_x).add_(first[:, None, None])
    return bordered.index_select(0, source.view(-1)).view(pixels.shape)


def look_up(pixels: Tensor, operation: np.ndarray, value: np.ndarray) -> Tensor:
    """Posterize, solarize, solarize_add and invert: uint8 (G, H, W, C)."""
    level, value = np.arange(256), value[:, None]
    tables = {
        "posterize": lambda value: level & ~((1 << (8 - value.astype(int))) - 1),
        "solarize": lambda value: np.where(level < value, level, 255 - level),
        "solarize_add": lambda value: np.where(level < 128, np.clip(level + value, 0, 255), level),
        "invert": lambda value: 255 - level + 0 * value,
    }
    table = np.empty((len(operation), 256), dtype=np.uint8)
    for name in TABLES:
        here = operation == NUMBER[name]
        if here.any():
            table[here] = tables[name](value[here]).astype(np.uint8)
    return to_device(table, pixels.device).gather(1, pixels.flatten(1).long()).view(pixels.shape)


def autocontrast(pixels: Tensor) -> Tensor:
    """Stretches each channel to 0..255: uint8 (G, H, W, C). In double precision, as Pillow counts: much falls on whole
    levels."""
    low, high = pixels.amin((1, 2), keepdim=True).double(), pixels.amax((1, 2), keepdim=True).double()
    is_flat = high == low
    scale = torch.where(is_flat, 1, 255 / (high - low))
    return (pixels * scale).sub_(torch.where(is_flat, 0, low * scale)).clamp_(0, 255).to(torch.uint8)


def equalize(pixels: Tensor) -> Tensor:
    """Makes the histogram of each channel even: uint8 (G, H, W, C)."""
    group, height, width, channels = pixels.shape
    flat = pixels.flatten(1, 2).transpose(1, 2).reshape(group * channels, height * width).long()
    counts = torch.zeros(len(flat), 256, dtype=torch.long, device=pixels.device)
    counts.scatter_add_(1, flat, torch.ones((), dtype=torch.long, device=pixels.device).expand_as(flat))
    last = counts.gather(1, flat.amax(1, keepdim=True))  # of the brightest level there is
    step = (flat.shape[1] - last) // 255
    below = counts.cumsum(1).sub_(counts)
    equal = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step > 0, equal, torch.arange(256, device=pixels.device)).to(torch.uint8)
    return table.gather(1, flat).view(group, channels, height, width).permute(0, 2, 3, 1)


def enhance(pixels: Tensor, operation: np.ndarray, value: np.ndarray) -> Tensor:
    """Brightness (from black), contrast (from the mean grey level), color (from grey) and sharpness (from a smoothed
    picture), in this order, by factors: uint8 (G, H, W, 3). 0 is the poorer picture, 1 changes nothing."""
    starts = np.searchsorted(operation, [NUMBER[name] for name in (*ENHANCEMENTS, "autocontrast")])
    contrast, color, sharpness, end = (int(start) for start in starts[1:])
    poorer = torch.zeros(pixels.shape, device=pixels.device)
    grey = luma(pixels[contrast:sharpness])
    mean = (grey[: color - contrast].flatten(1).double().mean(1) + 0.5).floor()
    poorer[contrast:color] = mean[:, None, None, None]
    poorer[color:sharpness] = grey[color - contrast :]
    poorer[sharpness:end] = smoothed(pixels[sharpness:end])
    factor = to_device(value.astype(np.float32), pixels.device)[:, None, None, None]
    return (pixels - poorer).mul_(factor).add_(poorer).clamp_(0, 255).to(torch.uint8)


def luma(pixels: Tensor) -> Tensor:
    """Grey levels of RGB images: int32 (G, H, W, 1). Source: ITU-R 601-2, in Pillow's 16-bit integers."""
    red, green, blue = (channel.int() for channel in pixels.unbind(3))
    return (
        red.mul_(19595).add_(green.mul_(38470)).add_(blue.mul_(7471)).add_(0x8000).bitwise_right_shift_(16)[..., None]
    )


def smoothed(pixels: Tensor) -> Tensor:
    """Pillow's 3x3 filter SMOOTH; the outermost pixels stay: float (G, H, W, C), whole grey levels."""
    x = pixels.short()
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    smooth = pixels.float()
    smooth[:, 1:-1, 1:-1] = ((total + 6).float() * (1 / 13)).floor()  # total / 13, rounded
    return smooth


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


def cutout(pixels: Tensor, value: np.ndarray, centre: np.ndarray, fill: int | Tensor) -> Tensor:
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
