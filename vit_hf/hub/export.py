"""The finished folder: fp32 weights from whatever the run trained in, and the image processor that fits them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def full_fp32_state_dict(model: nn.Module, zero_stage: int) -> dict[str, Tensor]:
    """All weights and buffers in fp32 on the CPU. Under ZeRO they are put together from the optimizer's fp32 master
    copies; all processes must call it."""
    if zero_stage == 0:
        return {name: _to_cpu(tensor) for name, tensor in model.state_dict().items()}
    from deepspeed.utils import safe_get_full_fp32_param

    buffers = {name: _to_cpu(tensor) for name, tensor in model.named_buffers() if name in model.state_dict()}
    return {
        name: _to_cpu(safe_get_full_fp32_param(parameter)) for name, parameter in model.named_parameters()
    } | buffers


def _to_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).clone().contiguous()


def save_model(model: PreTrainedModel, state_dict: dict[str, Tensor], processor: Any, output_dir: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json (and the code of a model that needs it)."""
    with torch.device("meta"):  # the trained object may hold 16-bit or partitioned weights; only its form is needed
        form = type(model)(model.config)
    form.save_pretrained(output_dir, state_dict=state_dict)
    processor.save_pretrained(output_dir)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
