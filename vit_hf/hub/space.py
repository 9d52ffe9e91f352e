"""A folder that is a Space of the Hub: a page that shows what a model answers, served by `python app.py`.

The page's code is space_template/app.py, which is no module of this package and runs without it; what it is told stands in
one line of it.
"""

import json
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vit_hf.errors import UserError

APP = Path(__file__).parent / "space_template" / "app.py"
GRADIO = "6.31.0"
PILLOW = "12.3.0"  # gradio wants one below 13
MODEL_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "model.safetensors.index.json", "*.py")
EXAMPLES = 6


def write_space(
    folder: Path,
    model: str,
    revision: str | None,
    remote_code: bool,
    images: list[Image.Image],
) -> None:
    """Writes README.md, app.py, requirements.txt, examples/, and model/ where the model is a folder.

    Args:
        folder: to write; must be new or empty.
        model: Hub id or folder. revision: commit of the Hub model.
        remote_code: the page runs code that comes with the model.
        images: examples, RGB.

    Raises:
        UserError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder}: holds something already; name a new folder")
    is_folder = Path(model).is_dir()
    name = Path(model).resolve().name if is_folder else model
    told = ("model" if is_folder else model, None if is_folder else revision, remote_code, name)
    line = f"MODEL, REVISION, REMOTE_CODE, NAME = {', '.join(map(_literal, told))}"
    app, count = re.subn(r"^MODEL, REVISION.*$", lambda _: line, APP.read_text(), flags=re.M)
    assert count == 1
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        aside = Path(scratch) / "space"
        _fill(aside, app, name, model, images)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)


def _fill(aside: Path, app: str, name: str, model: str, images: list[Image.Image]) -> None:
    is_folder = Path(model).is_dir()
    (aside / "examples").mkdir(parents=True)
    (aside / "app.py").write_text(app)
    (aside / "README.md").write_text(_readme(name, model, is_folder))
    (aside / "requirements.txt").write_text(_requirements())
    for number, image in enumerate(images):
        image.save(aside / "examples" / f"example-{number}.png")
    if is_folder:
        (aside / "model").mkdir()
        for path in sorted({path for pattern in MODEL_FILES for path in Path(model).glob(pattern)}):
            shutil.copy(path, aside / "model" / path.name)
        (aside / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def needs_code(config: dict[str, Any]) -> bool:
    """Whether a model's class comes with its repository."""
    return "auto_map" in config


def read_config(model: str, revision: str | None) -> tuple[dict[str, Any], str | None]:
    """config.json of a folder or a Hub id, and the commit of the latter.

    Raises:
        OSError, ValueError: it cannot be had.
    """
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            from vit_hf.models.transfer import no_model

            raise OSError(no_model(model))
        return json.loads((Path(model) / "config.json").read_text()), None
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(model, "config.json", revision=revision))
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    return json.loads(path.read_text()), commit[1] if commit else revision


def _readme(name: str, model: str, is_folder: bool) -> str:
    title = name.split("/")[-1]
    metadata: dict[str, Any] = {
        "title": title, "emoji": "🔎", "colorFrom": "blue", "colorTo": "gray", "sdk": "gradio", "sdk_version": GRADIO,
        "python_version": "3.11", "app_file": "app.py", "pinned": False,
    }  # fmt: skip
    if not is_folder:
        metadata["models"] = [model]
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    of = "the folder `model/`" if is_folder else f"[{model}](https://huggingface.co/{model})"
    return (
        f"---\n{head}---\n\n# {title}\n\nUpload a picture: the five likeliest classes, as {of} answers, and for a Vision Transformer "
        "which patches reached the answer (attention rollout).\n\nOn your own machine: `pip install -r requirements.txt`, "
        "then `python app.py`.\n"
    )


def _requirements() -> str:
    """Pinned to what is installed here, which the model was loaded with; gradio's pillow is older than ours."""
    pins = {"gradio": GRADIO, "pillow": PILLOW}
    for package in ("torch", "transformers", "huggingface_hub", "safetensors", "numpy"):
        pins[package] = version(package).partition("+")[0]
    return "".join(f"{package}=={pin}\n" for package, pin in pins.items())


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
