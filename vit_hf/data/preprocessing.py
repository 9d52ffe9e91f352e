"""How an evaluation image becomes the model's input: the steps as values, chosen from the flags, the model and the
images, read from and written to an image processor's file.

This module must not know how a file is decoded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from vit_hf.arguments import RandomCrop
from vit_hf.data.randomness import INTERPOLATION, uniform
from vit_hf.errors import ArgumentError

CROP_PCT = 0.875  # 224 / 256: arXiv 1512.03385's centre of 224 pixels out of a shorter side of 256; timm's default too
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's defaults
SHARPER = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)  # resizes whose random crops are bicubic


@dataclass(frozen=True)
class Preprocessing:
    """How an evaluation image becomes the model's input: resized with Pillow (bilinear unless the processor says
    otherwise), cropped where `shortest_edge` or `resized` is set, scaled to [0, 1] and normalised.

    Args:
        image_size: (height, width) in pixels of the result.
        shortest_edge: resize so that the shorter side has this many pixels, then cut the centre; None resizes both
            sides to image_size, whatever the shape.
        image_mean, image_std: for each channel, in [0, 1].
        resized: (height, width) to resize both sides to before the centre is cut, as DeiT's processor does; None where
            there is nothing to cut or `shortest_edge` says it.
        random_interpolation: whether training's random crops draw bilinear or bicubic for each sample.
    """

    image_size: tuple[int, int]
    shortest_edge: int | None = None
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = Image.Resampling.BILINEAR
    resized: tuple[int, int] | None = None
    random_interpolation: bool = False

    def __post_init__(self):
        """Raises ValueError for values that no image could be brought to."""
        for name, low in (("image_mean", -math.inf), ("image_std", 0)):
            values = getattr(self, name)
            right = isinstance(values, tuple) and len(values) == 3 and all(isinstance(v, int | float) for v in values)
            if not right or min(values) <= low:
                above = " above 0" if low == 0 else ""
                raise ValueError(f"its image processor has {name} {values!r}, allowed are three numbers{above}")
        sides = (*self.image_size, *(self.resized or ()), self.shortest_edge or 1)
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"its image processor has sizes {sides}, allowed are whole numbers above 0")
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"its image processor has resample {self.resample!r}, allowed are 0 to 5")

    @property
    def interpolation(self) -> str:
        """Pillow's name of the resize: nearest, lanczos, bilinear, bicubic, box or hamming."""
        return Image.Resampling(self.resample).name.lower()

    @property
    def eval_resize(self) -> str:
        """Which sides are resized to a fixed length: shortest (the shape stays), or square (both)."""
        return "square" if self.shortest_edge is None else "shortest"

    @property
    def resized_to(self) -> int | list[int]:
        """What an image is resized to before anything is cut: pixels of the shorter side, or [height, width]."""
        return list(self.resized or self.image_size) if self.shortest_edge is None else self.shortest_edge

    def __str__(self) -> str:
        to = self.resized_to
        sides = f"shorter side to {to}" if isinstance(to, int) else f"both sides to {to[0]}x{to[1]}"
        cut = "" if self.shortest_edge is None and self.resized is None else ", the centre of {}x{}"
        crops = "; random crops bilinear or bicubic, drawn" if self.random_interpolation else ""
        return f"{sides}{cut.format(*self.image_size)}, {self.interpolation}{crops}"

    def with_resize(self, eval_resize: str, crop_pct: float) -> "Preprocessing":
        """The same with another resize: a side of the result is `crop_pct` of what the image is resized to, rounded
        down. Where the result is not a square, the shorter side is held against its longer one, so that nothing has to
        be filled up.

        Source: timm, transforms_imagenet_eval (crop modes center and squash). It cuts the centre one pixel further
        down or right where what is cut off is 3, 7, 11, ... pixels (it rounds the half to even, the image processor
        down), and fits a result that is no square side by side.
        """
        height, width = (int(side / crop_pct) for side in self.image_size)
        if eval_resize == "shortest":
            return replace(self, shortest_edge=max(height, width), resized=None)
        whole = (height, width) == self.image_size
        return replace(self, shortest_edge=None, resized=None if whole else (height, width))

    def whole_image(self) -> "Preprocessing":
        """The same with nothing cut off: what a decoded set is stored as whose random crops are cut later."""
        return replace(self, shortest_edge=None, resized=None)

    def bicubic_crops(self, keys: np.ndarray) -> np.ndarray:
        """Which samples' random crops are resized bicubic, by their keys: bool (B,). The others are bilinear."""
        if self.random_interpolation:
            return uniform(keys, INTERPOLATION) < 0.5
        return np.full(len(keys), self.resample in SHARPER)

    def at_size(self, image_size: tuple[int, int]) -> "Preprocessing":
        """The same steps to images of another (height, width); what is resized before a crop scales along."""
        ratios = [new / old for new, old in zip(image_size, self.image_size, strict=True)]
        return replace(
            self,
            image_size=image_size,
            shortest_edge=None if self.shortest_edge is None else round(self.shortest_edge * max(ratios)),
            resized=None if self.resized is None else tuple(round(s * r) for s, r in zip(self.resized, ratios)),
        )

    def image_processor(self):
        """The transformers image processor that does the same."""
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        height, width = self.resized or self.image_size
        both_sides = {"height": height, "width": width}
        return ViTImageProcessorPil(
            size={"shortest_edge": self.shortest_edge} if self.shortest_edge else both_sides,
            do_center_crop=self.shortest_edge is not None or self.resized is not None,
            crop_size={"height": self.image_size[0], "width": self.image_size[1]},
            resample=self.resample,
            image_mean=list(self.image_mean),
            image_std=list(self.image_std),
            do_convert_rgb=True,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any], image_size: tuple[int, int]) -> "Preprocessing":
        """Reads a preprocessor_config.json; `image_size` stands in where it names no size. Raises ValueError for steps
        that are not a resize, a centre crop and a normalisation."""
        if config.get("do_resize") is False or config.get("do_rescale") is False:
            raise ValueError("an image processor that does not resize or does not rescale is not supported")
        if abs((config.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-3:
            raise ValueError(f"an image processor with rescale_factor {config['rescale_factor']} is not supported")

        def sides(size: Any) -> tuple[int, int]:
            size = {"height": size, "width": size} if isinstance(size, int) else size or {}
            return size.get("height", image_size[0]), size.get("width", image_size[1])

        size, crops = config.get("size"), bool(config.get("do_center_crop"))
        shortest_edge = size.get("shortest_edge") if isinstance(size, dict) else None
        result, resized = sides(config.get("crop_size") or size) if crops else sides(size), None
        if config.get("crop_pct"):  # ConvNext's and ResNet's: below 384 pixels the centre of a larger image
            edge = shortest_edge or result[0]
            result, shortest_edge = (edge, edge), int(edge / config["crop_pct"]) if edge < 384 else None
        elif crops and shortest_edge is None and sides(size) != result:
            resized = sides(size)
        elif shortest_edge and not crops:
            result, shortest_edge = (shortest_edge, shortest_edge), None
        normalises = config.get("do_normalize", True)
        return cls(
            image_size=result,
            shortest_edge=shortest_edge,
            image_mean=_three(config.get("image_mean"), (0.5,) * 3) if normalises else (0.0,) * 3,
            image_std=_three(config.get("image_std"), (0.5,) * 3) if normalises else (1.0,) * 3,
            resample=Image.Resampling.BILINEAR if config.get("resample") is None else config["resample"],
            resized=resized,
        )

    @classmethod
    def from_timm(cls, pretrained_cfg: dict[str, Any], image_size: tuple[int, int]) -> "Preprocessing":
        """Reads the `pretrained_cfg` of timm's config.json; `image_size` stands in where it names no size, and timm's own
        defaults for all else. Raises ValueError for steps that are not a resize, a centre crop and a normalisation.

        Source: timm, resolve_data_config.
        """
        name = str(pretrained_cfg.get("interpolation") or "bicubic")
        crop_mode, crop_pct = pretrained_cfg.get("crop_mode") or "center", pretrained_cfg.get("crop_pct") or CROP_PCT
        if name.upper() not in Image.Resampling.__members__:
            known = ", ".join(Image.Resampling.__members__).lower()
            raise ValueError(f"its pretrained_cfg has interpolation {name!r}, known are {known}")
        if crop_mode not in ("center", "squash"):
            raise ValueError(f"its pretrained_cfg has crop_mode {crop_mode!r}, supported are center and squash")
        if not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1:
            raise ValueError(f"its pretrained_cfg has crop_pct {crop_pct!r}, supported is above 0 to 1")
        return cls(
            image_size=tuple((pretrained_cfg.get("input_size") or [3, *image_size])[1:]),
            image_mean=_three(pretrained_cfg.get("mean"), IMAGENET_MEAN),
            image_std=_three(pretrained_cfg.get("std"), IMAGENET_STD),
            resample=Image.Resampling[name.upper()],
        ).with_resize("square" if crop_mode == "squash" else "shortest", crop_pct)

    def to_timm(self) -> dict[str, Any]:
        """What timm's config.json says of these steps in `pretrained_cfg`. Both sides of a resize before a crop are
        taken to have the share of the longer one."""
        side, to = max(self.image_size), self.resized_to
        to = to if isinstance(to, int) else max(to)
        crop_pct = side / to if int(side / (side / to)) == to else side / (to + 0.5)  # timm rounds down
        return {
            "interpolation": self.interpolation,
            "crop_pct": crop_pct,
            "crop_mode": "squash" if self.shortest_edge is None else "center",
            "mean": list(self.image_mean),
            "std": list(self.image_std),
        }


def _three(values: Any, default: tuple[float, ...]) -> Any:
    """The numbers of the channels as a tuple; what is no list stays as it is, to be refused."""
    return default if values is None else tuple(values) if isinstance(values, list | tuple) else values


@dataclass(frozen=True)
class PreprocessingSettings:
    """What the flags of the same names say of a model's input.

    Args:
        random_crop: training's; its padding has to fit.
        interpolation: auto, bilinear or bicubic; `random` is auto whose random crops draw one of the two.
        crop_pct: share of the resized side that is kept; by itself it means `eval_resize` shortest.
        eval_resize: auto, shortest or square.
        image_mean, image_std: for each channel.
    """

    random_crop: RandomCrop = RandomCrop()
    interpolation: str = "auto"
    crop_pct: float | None = None
    eval_resize: str = "auto"
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None


def choose_preprocessing(
    image_size: int | list[int] | tuple[int, int],
    own: Preprocessing | None,
    sizes_of_images: Callable[[], list[tuple[int, int]]],
    settings: PreprocessingSettings = PreprocessingSettings(),
) -> Preprocessing:
    """What a run does to its images: as the flags say; else as the model's own processor; else by the images: shorter
    side to size / CROP_PCT and the centre where most of them are larger than the input, both sides to the size where
    they are not, bilinear.

    Args:
        image_size: (height, width) of the model's input, or the side of a square.
        own: what the model came with; its pixels before a crop scale along with the size.
        sizes_of_images: gives (height, width) of some images of the set; asked only where the images decide.

    Raises:
        ArgumentError: a padding that is not smaller than the image.
    """
    image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    random_crop, crop_pct = settings.random_crop, settings.crop_pct
    if random_crop.kind in ("padding", "simple") and random_crop.amount >= min(image_size):
        raise ArgumentError(
            f"--random_crop: a padding of {random_crop.amount:g} is not below the image's side of {min(image_size)} pixels"
        )
    chosen = Preprocessing(image_size) if own is None else own.at_size(image_size)
    kind = settings.eval_resize
    if kind == "auto" and (crop_pct is not None or (own is None and mostly_larger(sizes_of_images(), image_size))):
        kind = "shortest"
    if crop_pct is not None or kind not in ("auto", chosen.eval_resize):
        chosen = chosen.with_resize(kind, crop_pct or {"shortest": CROP_PCT, "square": 1.0}[kind])
    if settings.interpolation in ("bilinear", "bicubic"):
        chosen = replace(chosen, resample=Image.Resampling[settings.interpolation.upper()])
    return replace(
        chosen,
        image_mean=tuple(settings.image_mean or chosen.image_mean),
        image_std=tuple(settings.image_std or chosen.image_std),
        random_interpolation=settings.interpolation == "random",
    )


def mostly_larger(sizes: list[tuple[int, int]], image_size: tuple[int, int]) -> bool:
    """Whether more than half of the images, (height, width) each, are larger than the input: neither side below the
    input's longer one, and one side above it."""
    side = max(image_size)
    larger = [min(size) >= side and max(size) > side for size in sizes]
    return sum(larger) * 2 > len(larger)


def own_preprocessing(
    name_or_path: str | None, revision: str | None, image_size: tuple[int, int]
) -> Preprocessing | None:
    """What a Hub id or a folder says of its images: its preprocessor_config.json, or else timm's `pretrained_cfg` in its
    config.json; None where it says nothing.

    Args:
        name_or_path: None says nothing.
        image_size: (height, width) of the model's input, where the file names no size.

    Raises:
        ValueError: steps that are not a resize, a centre crop and a normalisation.
        OSError: a file that is there and cannot be read, or a Hub that cannot be asked whether there is one.
    """
    if name_or_path is None:
        return None
    from transformers import ImageProcessingMixin, PreTrainedConfig
    from transformers.utils import cached_file

    def has(file: str) -> bool:
        return (
            cached_file(name_or_path, file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
        )

    if has("preprocessor_config.json") or has("processor_config.json"):
        config = ImageProcessingMixin.get_image_processor_dict(name_or_path, revision=revision)[0]
        return Preprocessing.from_config(config, image_size)
    if not has("config.json"):
        return None
    config = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)[0]
    pretrained_cfg = config.get("pretrained_cfg") or (config if "architecture" in config else None)
    return Preprocessing.from_timm(pretrained_cfg, image_size) if pretrained_cfg else None
