"""A run with --freeze, from the flag to the model card."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.runs import DEMO_DEFAULTS, in_process
from vit_hf.errors import UserError
from vit_hf.models.presets import from_preset


def test_linear_probing_changes_the_head_alone_and_the_card_says_so(tmp_path, capsys):
    in_process("pretrain", **DEMO_DEFAULTS, output_dir=tmp_path, freeze="encoder", ema_decay=0.5)
    torch.manual_seed(0)
    changes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    random = from_preset("vit-demo-patch8-32", list("0123456789"), changes)
    random.save_pretrained(tmp_path / "random")
    before, after = load_file(tmp_path / "random/model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert yaml.safe_load((tmp_path / "run_config.yaml").read_text())["resolved"]["num_trained_parameters"] == 330
    assert "M parameters (330 of them trained)" in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    assert "M parameters (330 of them trained)" in card and "\nfreeze: encoder\n" in card


def test_a_mistyped_part_is_seen_before_anything_is_written(tmp_path):
    flags = {**DEMO_DEFAULTS, "output_dir": tmp_path / "run", "freeze": "embedings"}
    with pytest.raises(UserError, match="--freeze: 'embedings' fits no parameter of this model; allowed are encoder"):
        in_process("pretrain", **flags)
    assert not (tmp_path / "run").exists()
