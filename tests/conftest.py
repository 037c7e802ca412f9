"""For every test: the repository on the path, the CPU, no network; fixtures of several files."""
import functools
import http.server
import importlib.util
import os
import subprocess
import sys
import threading
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

from fast import sampling, training
from support import threads

# Most products here are small: more threads gain little, and wait long where a core is busy.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Thread counts and what memory allowed are one test's, not the next one's."""
    monkeypatch.setattr(threads, "workers", 1)
    monkeypatch.setattr(threads, "parts", 1)
    monkeypatch.setattr(training, "fitting", float("inf"))
    monkeypatch.setattr(sampling, "fitting", float("inf"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def server(tmp_path):
    """A web server on loopback over tmp_path/www; yields its address."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


LAYOUTS = {"qwen": ["--as-qwen2"], "llama": []}


@pytest.fixture(scope="session")
def smollm2_scripts(tmp_path_factory):
    """{layout: (the assets' script at work, its folder)}: both at once, as each takes a while."""
    script = ASSETS.parent / "get_smollm2.py"
    if not script.is_file():
        pytest.skip("needs get_smollm2.py beside the folder named by TINYLORA_ASSETS")
    if not importlib.util.find_spec("gguf"):
        pytest.skip("needs gguf (requirements-dev.txt)")
    started = {}
    for layout, flags in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("smollm2") / layout
        command = [sys.executable, str(script), str(folder), *flags]
        with open(folder.parent / "errors.txt", "wb") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        started[layout] = process, folder
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="session", params=LAYOUTS)
def smollm2(request):
    """The real SmolLM2-135M-Instruct: (layout, folder)."""
    ready = os.environ.get("TINYLORA_SMOLLM2")  # folders made before: <this>-qwen, <this>-llama
    if ready:
        return request.param, Path(f"{ready}-{request.param}")
    process, folder = request.getfixturevalue("smollm2_scripts")[request.param]
    if process.wait():  # a second time too: pytest may set this up again for another file
        errors = (folder.parent / "errors.txt").read_text(errors="replace")
        pytest.skip(f"needs the package registry: {errors[-300:]}")
    return request.param, folder
