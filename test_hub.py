"""python -m pytest -q test_hub.py        --model OWNER/NAME against a hub on loopback and the hub's own cache layout; docstrings name the bug guarded.

No function is replaced: train.py runs in a process of its own and huggingface_hub does what it does. What it asks for is written down.
"""
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
NAME, SHA, CLOSED = "owner/name", "0123456789" * 4, "http://127.0.0.1:9"  # nobody listens at the last
SNAPSHOT = f"hf/hub/models--owner--name/snapshots/{SHA}"
WANTED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "model.safetensors"}
DECOYS = {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5", "flax_model.msgpack", "onnx/config.json", "onnx/model.onnx",
          "onnx/model.safetensors", "original/consolidated.00.pth", "modeling_evil.py", "README.md"}


def long_weights():
    """The toy's, 20 MB longer by a tensor that loading skips: huggingface_hub writes by 10 MB, so a shorter file has nothing to resume."""
    data = (ROOT / "toy" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    end = len(data) - start
    extra = {"rotary_emb.inv_freq": {"dtype": "F32", "shape": [5 << 20], "data_offsets": [end, end + (20 << 20)]}}
    text = json.dumps(json.loads(data[8:start]) | extra).encode()
    return len(text).to_bytes(8, "little") + text + data[start:] + random.Random(0).randbytes(20 << 20)


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of the hub as snapshot_download asks for: the revision, the list of files, HEAD and GET of each, with Range."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path, files = self.server, self.path.partition("?")[0], self.server.files
        hub.seen.append((self.command, path, self.headers["Range"]))
        if path.startswith("/api/models/owner/gated/"):
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if path == f"/api/models/{NAME}/revision/main":
            return self.reply(200, json.dumps({"id": NAME, "sha": SHA, "siblings": [{"rfilename": f} for f in files]}).encode())
        if path == f"/api/models/{NAME}/tree/{SHA}":
            return self.reply(200, json.dumps([{"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for f, b in files.items()]).encode())
        name = path.removeprefix(f"/{NAME}/resolve/{SHA}/")
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        data, event = files[name], hub.events.pop(0) if hub.events and self.command == "GET" and name == "model.safetensors" else None
        first = int((re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "") or "00")[1])
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if event == "down":
            return self.reply(500, b"")
        headers |= {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if first else {}
        self.reply(206 if first else 200, data[first:], headers, 12 << 20 if event == "cut" else None)

    def reply(self, status, body, headers={}, cut=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut] if self.command == "GET" else b"")
        self.close_connection |= cut is not None

    do_HEAD, log_message = do_GET, lambda *args: None


@pytest.fixture
def hub():
    """A running hub: .seen are its requests; .events what befalls the next GETs of the weights ("cut" in the middle, "down": 500)."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url, server.seen, server.events = f"http://127.0.0.1:{server.server_port}", [], []
        server.files = {f: (ROOT / "toy" / f).read_bytes() for f in WANTED - {"vocab.json", "model.safetensors"}} | {f: b"{}" for f in {"vocab.json", *DECOYS}}
        server.files["model.safetensors"] = long_weights()
        server.fetched = lambda: [(p.removeprefix(f"/{NAME}/resolve/{SHA}/"), r) for m, p, r in server.seen if m == "GET" and "/resolve/" in p]
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()


def start(tmp_path, url, name=NAME, offline=0):
    """train.py on its way, with a home of its own and nothing of this machine's hub settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "XDG_", "TQDM")) and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": str(offline), "HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1"}
    flags = ["--eval-count", "2", "--max-new-tokens", "8", "--data", "toy", "--model", name, "--out", tempfile.mkdtemp(dir=tmp_path)]
    (tmp_path / "home").mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "train.py", "--eval-only", *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def works(process):
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "evaluation, greedy: strict" in out and errors == "", errors


def fails(process, *words):
    """Exit code 2 and one line on stderr: no bars, no warnings, no traceback."""
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and all(word in errors for word in words), errors


def check_cache(tmp_path, hub, names):
    """Exactly these files are in the snapshot, whole; every blob has the sum it is named by; nothing lies outside HF_HOME."""
    folder = tmp_path / SNAPSHOT
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {f: hub.files[f] for f in names}
    blobs = [p for p in (folder.parents[1] / "blobs").iterdir() if not p.name.endswith(".incomplete")]
    assert all(hashlib.sha1(p.read_bytes()).hexdigest() == p.name for p in blobs) and not list((tmp_path / "home").rglob("*"))


def test_download_is_resumed_then_works_offline(hub, tmp_path):
    """Other weights or a subfolder's config fetched; the hub asked twice in one run; a cut connection that starts over or fails; a cache outside HF_HOME or deaf to HF_HUB_OFFLINE."""
    hub.events = ["cut"]
    works(start(tmp_path, hub.url))
    assert sorted(hub.fetched(), key=str) == sorted([*((f, None) for f in WANTED), ("model.safetensors", "bytes=10485760-")], key=str)
    assert not [p for _, p, _ in hub.seen for decoy in DECOYS if p.endswith("/" + decoy)]  # not so much as a HEAD
    assert [p for _, p, _ in hub.seen].count(f"/api/models/{NAME}/revision/main") == 1
    check_cache(tmp_path, hub, WANTED)
    hub.seen.clear()
    works(start(tmp_path, hub.url, offline=1))
    assert not hub.seen
    (tmp_path / SNAPSHOT / "model.safetensors").resolve().unlink()  # the blob: a link to nothing stays
    fails(start(tmp_path, CLOSED, offline=1), f"--model {NAME}: ", "model.safetensors", "HF_HUB_OFFLINE")


def test_a_broken_download_is_mended_by_the_next_run(hub, tmp_path):
    """A half file taken for a whole one; all fetched anew. (huggingface_hub 2.4 keeps whole files across runs, the broken one starts again; others send a Range.)"""
    hub.events = ["cut", "down"]
    fails(start(tmp_path, hub.url), f"--model {NAME}: ", "model.safetensors", "500")
    assert not hub.events
    check_cache(tmp_path, hub, WANTED - {"model.safetensors"})
    hub.seen.clear()
    works(start(tmp_path, hub.url))
    assert [f for f, _ in hub.fetched()] == ["model.safetensors"]
    check_cache(tmp_path, hub, WANTED)


def test_no_network_no_repository_no_access_are_one_line(hub, tmp_path):
    """A traceback, a paragraph or "404 Client Error." alone: the line names the model and says what to do."""
    runs = [(start(tmp_path, CLOSED), NAME, "check the name, the network", "Connection refused"),
            (start(tmp_path, hub.url, "owner/unknown"), "owner/unknown", "Repository Not Found", "check the name"),
            (start(tmp_path, hub.url, "owner/gated"), "owner/gated", "gated", "HF_TOKEN")]
    for process, name, *words in runs:
        fails(process, f"--model {name}: ", *words)


def test_the_cache_as_others_left_it(tmp_path):
    """Only our own downloads found; pytorch_model.bin opened in want of safetensors (it is a pickle, and runs what it likes), or code beside it."""
    folder = tmp_path / SNAPSHOT
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(SHA)
    for name in WANTED - {"vocab.json", "config.json"}:
        (folder / name).symlink_to(ROOT / "toy" / name)
    config = json.loads((ROOT / "toy" / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/opened'\ntR.".encode())
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')\n")
    works(start(tmp_path, CLOSED, offline=1))
    (folder / "model.safetensors").unlink()
    fails(start(tmp_path, CLOSED, offline=1), str(folder), "model.safetensors")
    assert not (tmp_path / "opened").exists()
