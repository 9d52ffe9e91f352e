"""`vit-hf space`: the folder it writes, and its page in a real browser."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager
from importlib.metadata import version

import pytest
import yaml
from PIL import Image

from tests.downloads import once
from tests.hub.hub_server import HubServer
from tests.runs import ROOT, in_process, python
from vit_hf.cli import dispatch
from vit_hf.errors import UserError
from vit_hf.hub.space import GRADIO, PILLOW

CHROME = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--window-size=1000,880")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run of a few steps: what it answers is not right, but it is its own."""
    from tests.runs import DEMO_DEFAULTS

    folder = tmp_path_factory.mktemp("space") / "tiny"
    in_process("pretrain", **DEMO_DEFAULTS, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def space(model):
    dispatch(["space", str(model), "--output_dir", str(model.with_name("page"))])
    return model.with_name("page")


def test_the_folder_is_a_space_with_pinned_requirements(model, space):
    head = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "gradio" and head["sdk_version"] == GRADIO and head["app_file"] == "app.py"
    pins = dict(line.split("==") for line in (space / "requirements.txt").read_text().split())
    assert {"gradio": GRADIO, "pillow": PILLOW}.items() <= pins.items() and {"torch", "transformers"} <= pins.keys()
    assert (space / "model/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert len(list((space / "examples").glob("*.png"))) == 6
    ast.parse((space / "app.py").read_text())
    assert "vit_hf" not in {
        name.name.split(".")[0] for node in ast.walk(ast.parse((space / "app.py").read_text()))
        if isinstance(node, ast.Import) for name in node.names
    }  # fmt: skip
    everything = "".join(path.read_text() for path in space.glob("*.*") if path.is_file())
    assert str(model.parent) not in everything  # no path of this machine


def test_a_folder_that_holds_something_is_not_written_to(model, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        dispatch(["space", str(model), "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="is no picture"):
        dispatch(["space", str(model), "--output_dir", str(tmp_path / "new"), "--images", str(tmp_path / "mine")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.fixture(scope="module")
def gradio():
    """A folder with gradio and what it needs, an older Pillow among it, for processes of their own."""

    hub = version("huggingface_hub")  # that of transformers here
    pins = [f"gradio=={GRADIO}", f"pillow=={PILLOW}", f"huggingface_hub=={hub}"]

    def install(folder):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, *pins]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            leave_out(f"gradio cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")

    return once(f"gradio-{GRADIO}-pillow-{PILLOW}-hub-{hub}-python3.{sys.version_info.minor}", install)


def leave_out(why):
    """Skips, but not where the browser's tests are asked for (.ci/run)."""
    (pytest.fail if os.environ.get("VIT_HF_BROWSER_TESTS") == "required" else pytest.skip)(why)


@contextmanager
def served(space, gradio):
    """`python app.py` -> its address."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(gradio), "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = space.with_name("app.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=environment, stdout=output, stderr=output
        )
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)  # it is still loading
        yield address
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser(profile):
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROME["chromium"]
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=Service(CHROME["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.mark.slow
def test_a_picture_that_is_uploaded_has_the_label_of_the_pipeline(model, space, gradio, tmp_path):
    """In a browser: the five classes and their shares are those of transformers' pipeline, and the rollout is drawn."""
    if not all(CHROME.values()):
        leave_out("no chromium with chromedriver on the path")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    from transformers import pipeline

    older = subprocess.run([sys.executable, "-c", "import PIL; print(PIL.__version__)"], env=os.environ | {"PYTHONPATH": str(gradio)},
                           capture_output=True, text=True)  # fmt: skip
    assert older.stdout.strip() == PILLOW
    picture = space / "examples/example-3.png"
    wanted = pipeline("image-classification", str(model))(Image.open(picture).convert("RGB"))
    with served(space, gradio) as address, browser(tmp_path / "profile") as driver:
        driver.get(address)
        wait = WebDriverWait(driver, 60)
        field = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "input[type=file]"))
        field.send_keys(str(picture.resolve()))
        wait.until(
            lambda page: page.find_elements(By.CSS_SELECTOR, "button[aria-label='Clear'], .image-frame img, img")
        )
        submit = wait.until(
            lambda page: next(b for b in page.find_elements(By.TAG_NAME, "button") if b.text == "Submit")
        )
        wait.until(
            lambda page: (
                "file=" in "".join(i.get_attribute("src") or "" for i in page.find_elements(By.TAG_NAME, "img"))
            )
        )
        submit.click()
        label = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "[data-testid=label-output-value]"))
        assert label.text.strip() == wanted[0]["label"]
        shown = [row.text.split() for row in driver.find_elements(By.CSS_SELECTOR, "[data-testid$=confidence-set]")]
        assert len(shown) == 5
        for row, one in zip(shown, wanted, strict=True):
            assert row[0] == one["label"] and abs(float(row[-1].rstrip("%")) / 100 - one["score"]) < 0.006
        wait.until(
            lambda page: (
                len([i for i in page.find_elements(By.TAG_NAME, "img") if "file=" in (i.get_attribute("src") or "")])
                >= 2
            )
        )


PAGES = """
import json, runpy, sys
import torch
from PIL import Image
from vit_hf.cli import dispatch

folder, picture = sys.argv[1:]
torch.manual_seed(0)
said = {}
for name, model in (("convolutions", f"{folder}/resnet"), ("probe", "tester/probe")):
    dispatch(["space", model, "--output_dir", f"{folder}/pages/{name}", "--images", picture])
    page = runpy.run_path(f"{folder}/pages/{name}/app.py")
    with Image.open(picture) as image:
        answer = page["classify"](image)
        said[name] = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(answer, tuple):
            pixels = page["processor"](image.convert("RGB"), return_tensors="pt")["pixel_values"]
            output = page["model"](pixels, output_attentions=True, output_hidden_states=True)
            shown = page["rollout"](output.attentions, output.hidden_states[-1])
            said["code"] = type(page["model"]).__module__
from vit_hf.analysis.attention import look
from vit_hf.models import ViTForImageClassification  # not before: the page must do without

ours = ViTForImageClassification.from_pretrained("tester/probe").eval()
said["far"] = float(abs(shown / shown.sum() - look(ours.vit, pixels)[0].rollout).max())
print(json.dumps(said))
"""


@pytest.mark.slow
def test_pages_of_a_resnet_and_of_a_hub_model_with_code_of_its_own(gradio, tmp_path):
    """Without a browser. A ResNet has the classes alone; the rollout of a model that a probe reads is that of `vit-hf
    figures`."""
    import torch

    from vit_hf.data.preprocessing import Preprocessing
    from vit_hf.models import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    probe = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=37, num_labels=3, pooling="map", num_register_tokens=2))  # fmt: skip
    torch.nn.init.normal_(probe.vit.attention_pool.probe)
    torch.nn.init.normal_(probe.classifier.weight)
    resnet = ResNetForImageClassification(
        ResNetConfig(image_size=16, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    )
    for name, made in (("probe", probe), ("resnet", resnet)):
        made.save_pretrained(tmp_path / name)
        Preprocessing((16, 16)).image_processor().save_pretrained(tmp_path / name)
    pixels = torch.arange(16 * 16 * 3, dtype=torch.uint8).reshape(16, 16, 3).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    with HubServer(tokens={"hf_test": "tester"}) as hub:
        hub.add_repo(
            "model", "tester/probe", {path.name: path.read_bytes() for path in (tmp_path / "probe").iterdir()}
        )
        environment = hub.env(home=tmp_path / "home") | {
            "PYTHONPATH": f"{gradio}:{ROOT}",
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
        done = python("-c", PAGES, tmp_path, tmp_path / "image.png", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert sum(said["convolutions"].values()) == pytest.approx(1, abs=1e-5) and len(said["convolutions"]) == 3
    assert said["far"] < 1e-6 and said["code"].startswith("transformers_modules.")
    assert "models:\n- tester/probe" in (tmp_path / "pages/probe/README.md").read_text()
