"""How an evaluation image becomes the model's input: the steps as values, from and to an image processor's file.

This module must not know how a file is decoded.
"""

from dataclasses import dataclass, replace
from typing import Any

from PIL import Image


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
    """

    image_size: tuple[int, int]
    shortest_edge: int | None = None
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = Image.Resampling.BILINEAR
    resized: tuple[int, int] | None = None

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
            image_mean=tuple(config.get("image_mean") or (0.5,) * 3) if normalises else (0.0,) * 3,
            image_std=tuple(config.get("image_std") or (0.5,) * 3) if normalises else (1.0,) * 3,
            resample=config.get("resample", Image.Resampling.BILINEAR),
            resized=resized,
        )


def processor_config(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """The preprocessor_config.json of a Hub id or folder; {} where there is none."""
    from transformers import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name_or_path, revision=revision)[0]
    except OSError:
        return {}


def processor_normalisation(name_or_path: str, revision: str | None = None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, as the model was trained with them; 0.5 where it does not say."""
    preprocessing = Preprocessing.from_config(processor_config(name_or_path, revision), (1, 1))
    return list(preprocessing.image_mean), list(preprocessing.image_std)
