# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""How a model of the family is read and saved: as transformers' own where that is the same model, with its code where
not."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel


class ReadsStock:
    """For a configuration that is transformers' own with more fields.

    stock_type: the `model_type` of a folder that is read as this configuration with its own fields at their defaults.
    """

    stock_type: str
    model_type: str

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' own. Raises ValueError for the configuration of another family."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        found = config.get("model_type", cls.stock_type)
        if found not in (cls.stock_type, cls.model_type):
            raise ValueError(
                f"its family (model_type) is {found}; {cls.__name__} reads {cls.stock_type} and {cls.model_type}"
            )
        return {**config, "model_type": cls.model_type}, kwargs


class SavesAsStock:
    """For a PreTrainedModel whose config has `is_stock` and `to_stock()`.

    stock_class: the class of transformers that is the same model when `config.is_stock`.
    code: the `auto_map` of a folder that is saved with its code.
    """

    stock_class: type[PreTrainedModel]
    code: dict[str, str]

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, state_dict: dict[str, Tensor] | None = None, **kwargs
    ):
        """As transformers' own. A model of stock options only is saved by transformers' class as a folder that loads
        without this package; any other is saved with its code."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        if self.config.is_stock:
            with torch.device("meta"):  # only its way of saving is needed
                stock = self.stock_class(self.config.to_stock()).to(self.dtype)
            stock.save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        else:
            self.config.auto_map = dict(self.code)
            super().save_pretrained(save_directory, state_dict=state_dict, save_original_format=False, **kwargs)
