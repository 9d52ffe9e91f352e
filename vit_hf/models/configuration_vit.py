# Copyright 2021 Google AI and The HuggingFace Inc. team (the structure of the stock ViT configuration).
# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""The fields of a Vision Transformer: those of transformers' ViTConfig and the paper's switches that it lacks."""

import dataclasses
import difflib
import math

import transformers
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .saving import ReadsStock

CHOICES = {
    "position_embedding": ("learned_1d", "learned_2d", "sincos_2d", "relative", "none"),
    "pooling": ("cls", "mean", "map"),
    "stem": ("patch", "hybrid_resnet", "conv"),
    "initializer": ("transformers", "paper"),
    "hidden_act": tuple(sorted(ACT2FN)),
    "pooler_act": tuple(sorted(ACT2FN)),  # read by transformers' own ViTModel alone
}
POSITIVE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
RATES = ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")
INITIAL = ("initializer", "head_bias_init")  # shape the random start alone: a trained model is the same without them


@strict
class ViTConfig(ReadsStock, transformers.ViTConfig):
    """transformers' ViTConfig with the paper's switches.

    A configuration whose own fields all have their defaults `is_stock`: it describes a plain transformers ViT, and
    the model is saved as one (`model_type: vit`). "ViT paper" below is arXiv 2010.11929.

    Args:
        position_embedding: what tells the tokens where they are (ViT paper, appendix D.4).
            `learned_1d`: a learned vector for each place in raster order. `learned_2d`: a learned vector of half the
            width for each row and for each column, put together. `sincos_2d`: fixed sines and cosines of row and
            column (arXiv 2205.01580). `relative`: a learned bias on the attention logits for each head and 2-D
            offset, as in Swin (arXiv 2103.14030, equation 4); the paper's own depends on the query. `none`.
        learned_grid_size: [rows, columns] of patches in which `sincos_2d` counts, None: those of `image_size`. Fine-tuning
            at another `image_size` keeps the grid of pretraining, so that a place in the image keeps its position (ViT
            paper, section 3.2).
        pooling: what the head reads. `cls`: the output of a class token (ViT paper, section 3.1). `mean`: the mean of
            the patch tokens, without a class token (ViT paper, appendix D.3; arXiv 2205.01580). `map`: multi-head
            attention pooling by one learned probe (arXiv 2106.04560, section 3.2).
        fc_norm: with `mean`, the final norm comes after the mean instead of before it (arXiv 2106.08254).
        head_hidden_size: width of the tanh layer before the classifier, the paper's pretraining head (section 3.1);
            None is the linear head of fine-tuning.
        head_bias_init: the classifier's initial bias.
        stem: what makes tokens of pixels. `patch`: one linear projection of each patch (section 3.1). `conv`: 3x3
            convolutions of stride 2, each with BatchNorm and ReLU, then a 1x1 (arXiv 2106.14881). `hybrid_resnet`: a
            ResNet with GroupNorm and standardised convolutions, whose feature map is cut into patches (section 3.1,
            "hybrid architecture"); patch_size then counts cells of that map.
        stem_depths: blocks of each stage of the hybrid's ResNet, None is [3, 4, 9]: a ResNet-50 without stage 4, whose
            blocks are added to stage 3 (stride 16). [3, 4, 6, 3] takes stage 4 (stride 32): a fourth of the tokens. [] is
            the root alone (stride 4).
        stem_width: channels of the hybrid's first convolution; stage i (from 0) gives 4 * 2**i as many.
        drop_path_rate: chance that the last layer's residual branches are left out for a sample, growing linearly
            from 0 at the first layer (arXiv 1603.09382).
        layer_scale_init: initial factor of each residual branch, learned for each channel (arXiv 2103.17239); None:
            no such factor.
        num_register_tokens: learned tokens without a position, between the class token and the patches, which the
            pooling leaves out (arXiv 2309.16588).
        qk_norm: a LayerNorm on the queries and keys of each head (arXiv 2302.05442, section 2.1).
        initializer: random start. `transformers`: normal(0, initializer_range). `paper`: the authors' code
            (google-research/vision_transformer, models_vit.py): Xavier for attention and MLP, LeCun for the
            projection of patches, zeros for the classifier.

    Raises:
        ValueError: a field value that does not exist, sizes that do not divide, or fields that exclude each other.
        StrictDataclassFieldValidationError: a value of another type than the field's, as in transformers' own.
    """

    model_type = "vit_hf"
    stock_type = "vit"

    position_embedding: str = "learned_1d"
    learned_grid_size: list[int] | None = None
    pooling: str = "cls"
    fc_norm: bool = False
    head_hidden_size: int | None = None
    head_bias_init: float | int = 0.0
    stem: str = "patch"
    stem_depths: list[int] | None = None
    stem_width: int = 64
    drop_path_rate: float | int = 0.0
    layer_scale_init: float | int | None = None
    num_register_tokens: int = 0
    qk_norm: bool = False
    initializer: str = "transformers"

    def __post_init__(self, **kwargs):
        # transformers keeps names that it does not know, so that a misspelt switch would do nothing
        own = [item.name for item in own_fields()]
        for name in kwargs:
            if close := difflib.get_close_matches(name, own, n=1, cutoff=0.9):
                raise ValueError(f"{name!r} is no field of ViTConfig, did you mean {close[0]}?")
        super().__post_init__(**kwargs)
        self._check_values()
        if self.stem == "hybrid_resnet" and self.stem_depths is None:
            self.stem_depths = [3, 4, 9]
        self._check_sizes()
        if self.learned_grid_size == list(self.grid_size):
            self.learned_grid_size = None
        self._check_combinations()

    def _check_values(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if not isinstance(size, int) and len(size) != 2:
                raise ValueError(f"{name}: {size} is neither a side nor [height, width]")
        least = {name: (getattr(self, name), 1) for name in POSITIVE}
        least |= {"image_size": (min(pair(self.image_size)), 1), "patch_size": (min(pair(self.patch_size)), 1)}
        least |= {"head_hidden_size": (self.head_hidden_size, 1), "stem_width": (self.stem_width, 1)}
        least |= {
            "stem_depths": (min(self.stem_depths or [1]), 1),
            "num_register_tokens": (self.num_register_tokens, 0),
        }
        for name, (value, low) in least.items():
            if value is not None and value < low:
                raise ValueError(f"{name}: {value} is out of range, allowed is {low} or more")
        for name in RATES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range, allowed is 0 to below 1")
        if self.layer_scale_init is not None and not 0 < self.layer_scale_init < math.inf:
            raise ValueError(f"layer_scale_init: {self.layer_scale_init} is out of range, allowed is above 0, or none")
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range, allowed is above 0")
        if not math.isfinite(self.head_bias_init):
            raise ValueError(f"head_bias_init: {self.head_bias_init} is not a finite number")

    def _check_sizes(self) -> None:
        def divides(name: str, size: int, by: str, divisor: int) -> None:
            if size % divisor:
                raise ValueError(f"{name} {size} is not divisible by {by} {divisor}")

        divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        what = "patch_size" if self.stem_stride == 1 else "the stem's stride times patch_size,"
        for size, patch in zip(pair(self.image_size), pair(self.patch_size), strict=True):
            divides("image_size", size, what, patch * self.stem_stride)
        if self.position_embedding == "learned_2d":
            divides("hidden_size", self.hidden_size, "position_embedding learned_2d:", 2)
        if self.position_embedding == "sincos_2d":
            divides("hidden_size", self.hidden_size, "position_embedding sincos_2d:", 4)
        if self.stem == "conv":
            height, width = pair(self.patch_size)
            if height != width or height < 2 or height & (height - 1):
                raise ValueError(
                    f"stem conv halves the image step by step: patch_size {self.patch_size} is no power of 2"
                )
            divides("hidden_size", self.hidden_size, "stem conv: half of patch_size,", height // 2)
        if self.stem == "hybrid_resnet":
            divides("stem_width", self.stem_width, "the number of groups of its GroupNorm,", 32)

    def _check_combinations(self) -> None:
        if self.learned_grid_size is not None:
            if self.position_embedding != "sincos_2d":
                raise ValueError(
                    f"learned_grid_size goes with position_embedding sincos_2d, not {self.position_embedding}"
                )
            if len(self.learned_grid_size) != 2 or min(self.learned_grid_size) < 1:
                raise ValueError(f"learned_grid_size: {self.learned_grid_size} is not [rows, columns], of 1 or more")
        if self.fc_norm and self.pooling != "mean":
            raise ValueError(f"fc_norm norms the mean of the tokens: it goes with pooling mean, not {self.pooling}")
        if self.stem != "hybrid_resnet" and (self.stem_depths is not None or self.stem_width != 64):
            raise ValueError(f"stem_depths and stem_width describe stem hybrid_resnet; the stem is {self.stem}")

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self.pooling == "cls"

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return self.has_class_token + self.num_register_tokens

    @property
    def stem_stride(self) -> int:
        """Pixels a cell of the feature map that is cut into patches: 1 where that is the image itself."""
        return hybrid_stride(self.stem_depths) if self.stem == "hybrid_resnet" else 1

    @property
    def token_stride(self) -> tuple[int, int]:
        """Pixels a patch token stands for, along the height and the width."""
        height, width = pair(self.patch_size)
        return height * self.stem_stride, width * self.stem_stride

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch tokens along the height and the width."""
        (height, width), stride = pair(self.image_size), self.token_stride
        return height // stride[0], width // stride[1]

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own ViT is the same model."""
        return not self._changed()

    def to_stock(self) -> transformers.ViTConfig:
        """The same model as transformers' own configuration. Raises ValueError where there is none."""
        if not self.is_stock:
            raise ValueError(f"transformers' ViT has no {', '.join(self._changed())}")
        drop = {item.name for item in own_fields()} | {"model_type", "auto_map", "architectures"}
        return transformers.ViTConfig(**{k: v for k, v in self.to_dict().items() if k not in drop})

    def _changed(self) -> list[str]:
        return [
            item.name for item in own_fields() if getattr(self, item.name) != item.default and item.name not in INITIAL
        ]


def own_fields() -> list[dataclasses.Field]:
    """The fields that transformers' ViTConfig does not have."""
    stock = {item.name for item in dataclasses.fields(transformers.ViTConfig)}
    return [item for item in dataclasses.fields(ViTConfig) if item.name not in stock]


def hybrid_stride(stem_depths: list[int]) -> int:
    """Pixels a cell of the ResNet's feature map: 4 after the root and the first stage, twice that with each further one."""
    return 4 * 2 ** max(len(stem_depths) - 1, 0)


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """A side or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


ViTConfig.register_for_auto_class()
