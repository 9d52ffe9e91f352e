"""Every preset trains: shrunken in depth, width and resolution, two steps of the real script, and is saved."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import DEMO_DEFAULTS, trajectory
from vit_hf.models.presets import PRESETS, preset_config
from vit_hf.models.transfer import load_pretrained

pytestmark = pytest.mark.slow


def shrunken(name):
    """Overrides that keep what the preset is for: its switches, its stages, the relation of image and patch."""
    config = preset_config(name)
    if config.model_type == "vit_hf":
        changes = dict(hidden_size=4 * config.num_attention_heads, num_hidden_layers=2, intermediate_size=16)
        changes["image_size"] = 2 * config.token_stride[0]
        if config.stem == "hybrid_resnet":
            changes["image_size"] = config.token_stride[0]
            changes |= dict(stem_width=32, stem_depths=[1] * len(config.stem_depths))
        return changes
    changes = dict(hidden_sizes=[64, 128, 128, 128], depths=[1, 1, 1, 1], embedding_size=32, image_size=32)
    return changes | (dict(num_groups=8) if config.model_type == "vit_hf_bit" else {})


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_two_steps(name, run):
    overrides = ",".join(f"{field}={value}" for field, value in shrunken(name).items())
    flags = {
        **DEMO_DEFAULTS,
        "preset": name,
        "config_overrides": overrides,
        "max_steps": 2,
        "max_eval_samples": 21,
        "warmup_steps": 0,
    }
    folder = run("pretrain", **flags, save_steps=2)
    losses = [loss for _, loss, _ in trajectory(folder)]
    assert len(losses) == 2 and losses[0] != losses[1]
    config = preset_config(name)
    model_type = config.stock_type if config.is_stock else config.model_type
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    saved, loaded = load_file(folder / "model.safetensors"), load_pretrained(str(folder)).state_dict()
    assert len(saved) == len(loaded) and all(torch.isfinite(tensor).all() for tensor in saved.values())
