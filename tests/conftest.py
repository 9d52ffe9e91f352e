"""Every test session has its own Hugging Face home, so that nothing is read from or left in the user's."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="vit_hf_tests_")
os.environ["HF_HOME"] = _HOME.name  # before anything imports huggingface_hub
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402

from tests.runs import DEMO_DEFAULTS, in_process  # noqa: E402


@pytest.fixture
def run(tmp_path):
    """Runs a script in this process: run("pretrain", max_steps=4, ...) -> its output folder."""

    def start(script, **flags):
        flags = {"output_dir": tmp_path / "run", **DEMO_DEFAULTS, **flags}
        in_process(script, **{name: value for name, value in flags.items() if value is not None})
        return flags["output_dir"]

    return start
