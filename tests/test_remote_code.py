"""Every variant as a Hub folder: what a process sees that never imported this package and stands elsewhere."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.families import FAMILIES
from tests.hub.hub_server import HubServer
from tests.runs import python
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.models.presets import from_preset
from vit_hf.training.model_folder import files_of

pytestmark = pytest.mark.slow
TOKEN = "hf_token_of_the_test"
NAMES = ["cat", "dog", "ship"]
FRESH = """
import json, sys
import numpy as np, torch
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

pixel_values, found = torch.from_numpy(np.load("pixel_values.npy")), {}
for name in sys.argv[1:]:
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True).eval()
    classify = pipeline("image-classification", name, trust_remote_code=True)
    with torch.no_grad():
        found[name] = dict(
            logits=model(pixel_values).logits.tolist(), id2label=list(model.config.id2label.values()),
            model_type=config.model_type, scores={entry["label"]: entry["score"] for entry in classify("image.png")},
        )
        encoder = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
        found[name]["tokens"] = encoder(pixel_values).last_hidden_state.tolist()
        if config.model_type in ("resnet", "bit"):
            backbone = AutoBackbone.from_pretrained(name, out_features=["stage2"]).eval()
            found[name]["stage2"] = backbone(pixel_values).feature_maps[0].tolist()
assert "vit_hf" not in sys.modules
print("RESULT" + json.dumps(found))
"""


def test_every_family_is_pushed_and_loads_by_id_without_the_package(tmp_path):
    """Saved as a run saves it, pushed to a local Hub, and loaded by the Auto classes and a pipeline: equal logits and
    tokens, BatchNorm statistics and class names included."""
    processor = Preprocessing((32, 32)).image_processor()
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "pixel_values.npy", pixel_values.numpy())
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    models = {}
    with HubServer(tokens={TOKEN: "tester"}) as hub:
        for family, (preset, changes) in FAMILIES.items():
            torch.manual_seed(1)
            model = models[f"tester/{family}"] = from_preset(preset, NAMES, changes).eval()
            with torch.no_grad():
                for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)]:
                    tensor.add_(torch.rand(tensor.shape) * 0.1)
            files = files_of(Accelerator(cpu=True), model, processor)
            (tmp_path / family).mkdir()
            files.write(tmp_path / family, model.state_dict())
        environment = hub.env(token=TOKEN, home=tmp_path / "home")
        pushed = python("-c", "\n".join((
            "import sys, pathlib", "from vit_hf.cli import dispatch",
            "for name in sys.argv[1:]: dispatch(['push', name, '--hub_model_id', 'tester/' + pathlib.Path(name).name])",
        )), *(tmp_path / family for family in FAMILIES), env=environment)  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr
        loaded = python("-c", FRESH, *models, env=environment | {"PYTHONPATH": ""}, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    found = json.loads(loaded.stdout.split("RESULT")[1])
    assert [name for name in found if "stage2" in found[name]] == ["tester/resnet-18", "tester/bit-224"]  # as stock
    for name, model in models.items():
        config = model.config
        assert found[name]["model_type"] == (config.stock_type if config.is_stock else config.model_type)
        assert found[name]["id2label"] == NAMES
        with torch.no_grad():
            expected = model(pixel_values)
            torch.testing.assert_close(torch.tensor(found[name]["logits"]), expected.logits, rtol=1e-4, atol=1e-5)
            tokens = model.base_model(pixel_values).last_hidden_state
            torch.testing.assert_close(torch.tensor(found[name]["tokens"]), tokens, rtol=1e-4, atol=1e-5)
            if "stage2" in found[name]:
                maps = model.base_model(pixel_values, output_hidden_states=True).hidden_states[2]
                torch.testing.assert_close(torch.tensor(found[name]["stage2"]), maps, rtol=1e-4, atol=1e-5)
            shown = torch.from_numpy(image).permute(2, 0, 1)[None] / 255 * 2 - 1
            scores = model(shown).logits.softmax(-1)[0].tolist()
        assert found[name]["scores"] == pytest.approx(dict(zip(NAMES, scores)), abs=1e-4)
