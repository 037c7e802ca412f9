"""--model OWNER/NAME against a hub on loopback, and the hub's own cache as others left it.

No function is replaced: train.py runs as a process with an empty home folder, huggingface_hub does
what it does, and the server writes down what it is asked for.
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

import pytest

from helpers import ROOT, TOY

NAME = "owner/name"
SHA = "0123456789" * 4
CLOSED = "http://127.0.0.1:9"  # nobody listens there
SNAPSHOT = f"hf/hub/models--owner--name/snapshots/{SHA}"
WANTED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "vocab.json", "model.safetensors"}
DECOYS = {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5",
          "flax_model.msgpack", "onnx/config.json", "onnx/model.onnx", "onnx/model.safetensors",
          "original/consolidated.00.pth", "modeling_evil.py", "README.md"}


def long_weights():
    """The toy's weights, 20 MB longer by a tensor that is skipped when they are loaded.

    huggingface_hub writes in pieces of 10 MB, so a shorter file has nothing to resume.
    """
    data = (TOY / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    end = len(data) - start
    extra = {"dtype": "F32", "shape": [5 << 20], "data_offsets": [end, end + (20 << 20)]}
    header = json.loads(data[8:start]) | {"rotary_emb.inv_freq": extra}
    text = json.dumps(header).encode()
    rest = random.Random(0).randbytes(20 << 20)
    return len(text).to_bytes(8, "little") + text + data[start:] + rest


def sha1(data):
    return hashlib.sha1(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of the hub as snapshot_download asks for: the revision, the list of files, and each
    file by HEAD and GET, with Range."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server
        path = self.path.partition("?")[0]
        hub.seen.append((self.command, path, self.headers["Range"]))
        if path.startswith("/api/models/owner/gated/"):
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path == f"/api/models/{NAME}/revision/main":
            siblings = [{"rfilename": name} for name in hub.files]
            self.reply_json({"id": NAME, "sha": SHA, "siblings": siblings})
        elif path == f"/api/models/{NAME}/tree/{SHA}":
            self.reply_json([{"type": "file", "path": name, "size": len(data), "oid": sha1(data)}
                             for name, data in hub.files.items()])
        else:
            name = path.removeprefix(f"/{NAME}/resolve/{SHA}/")
            if name in hub.files:
                self.reply_file(name)
            else:
                self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply_file(self, name):
        hub = self.server
        data = hub.files[name]
        event = None
        if hub.events and self.command == "GET" and name == "model.safetensors":
            event = hub.events.pop(0)
        if event == "down":
            return self.reply(500, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        first = int(wanted[1]) if wanted else 0
        headers = {"ETag": f'"{sha1(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = 12 << 20 if event == "cut" else None
        self.reply(206 if first else 200, data[first:], headers, cut)

    def reply_json(self, value):
        self.reply(200, json.dumps(value).encode())

    def reply(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection |= cut is not None

    def log_message(self, *args):
        pass


class Hub(http.server.ThreadingHTTPServer):
    """.seen: its requests; .events: what happens to the next GETs of the weights, "cut" in the
    middle or "down" (500)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen = []
        self.events = []
        self.files = dict.fromkeys({"vocab.json", *DECOYS}, b"{}")
        for name in WANTED - {"vocab.json", "model.safetensors"}:
            self.files[name] = (TOY / name).read_bytes()
        self.files["model.safetensors"] = long_weights()

    def fetched(self):
        """(name, Range) of the files that were fetched."""
        prefix = f"/{NAME}/resolve/{SHA}/"
        return [(path.removeprefix(prefix), asked) for method, path, asked in self.seen
                if method == "GET" and path.startswith(prefix)]


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()


def start(tmp_path, url, name=NAME, offline=0):
    """train.py with an empty home folder and none of this machine's settings for the hub."""
    def foreign(key):
        is_hub = key.startswith(("HF_", "HUGGING", "XDG_", "TQDM"))
        return is_hub or key.lower().endswith("_proxy")
    env = {key: value for key, value in os.environ.items() if not foreign(key)}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": str(offline),
            "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "home").mkdir(exist_ok=True)
    command = [sys.executable, "train.py", "--eval-only", "--eval-count", "2", "--max-new-tokens",
               "8", "--data", "toy", "--model", name, "--out", tempfile.mkdtemp(dir=tmp_path)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def works(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "evaluation, greedy: strict" in out and errors == "", errors


def fails(process, *words):
    """Exit code 2 and one line on stderr: no bars, no warnings, no traceback."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert all(word in errors for word in words), errors


def check_cache(tmp_path, hub, names):
    """Exactly these files are in the snapshot, whole; every blob has the sum that it is named by;
    nothing lies outside HF_HOME."""
    folder = tmp_path / SNAPSHOT
    found = {str(path.relative_to(folder)): path.read_bytes()
             for path in folder.rglob("*") if path.is_file()}
    assert found == {name: hub.files[name] for name in names}
    for path in (folder.parents[1] / "blobs").iterdir():
        assert path.suffix == ".incomplete" or sha1(path.read_bytes()) == path.name
    assert not list((tmp_path / "home").rglob("*"))


def test_a_download_is_resumed_and_works_offline(hub, tmp_path):
    """Other weights or a subfolder's config fetched; the hub asked twice in one run; a cut
    connection that starts over or fails; a cache outside HF_HOME; HF_HUB_OFFLINE ignored."""
    hub.events = ["cut"]
    works(start(tmp_path, hub.url))
    wanted = [(name, None) for name in WANTED] + [("model.safetensors", "bytes=10485760-")]
    assert sorted(hub.fetched(), key=str) == sorted(wanted, key=str)
    paths = [path for _, path, _ in hub.seen]
    assert not [path for path in paths for decoy in DECOYS if path.endswith("/" + decoy)]
    assert paths.count(f"/api/models/{NAME}/revision/main") == 1
    check_cache(tmp_path, hub, WANTED)
    hub.seen.clear()
    works(start(tmp_path, hub.url, offline=1))
    assert not hub.seen
    (tmp_path / SNAPSHOT / "model.safetensors").resolve().unlink()  # a link to nothing stays
    process = start(tmp_path, CLOSED, offline=1)
    fails(process, f"--model {NAME}: ", "model.safetensors", "HF_HUB_OFFLINE")


def test_a_broken_download_is_mended_by_the_next_run(hub, tmp_path):
    """Half a file taken for a whole one; everything fetched again."""
    hub.events = ["cut", "down"]
    fails(start(tmp_path, hub.url), f"--model {NAME}: ", "model.safetensors", "500")
    assert not hub.events
    check_cache(tmp_path, hub, WANTED - {"model.safetensors"})
    hub.seen.clear()
    works(start(tmp_path, hub.url))
    assert [name for name, _ in hub.fetched()] == ["model.safetensors"]
    check_cache(tmp_path, hub, WANTED)


def test_no_network_no_repository_no_access_are_one_line(hub, tmp_path):
    """A traceback, a paragraph, or "404 Client Error." alone: the line must name the model and say
    what to do."""
    runs = [(start(tmp_path, CLOSED), NAME, "check the name, the network", "Connection refused"),
            (start(tmp_path, hub.url, "owner/unknown"), "owner/unknown",
             "Repository Not Found", "check the name"),
            (start(tmp_path, hub.url, "owner/gated"), "owner/gated", "gated", "HF_TOKEN")]
    for process, name, *words in runs:
        fails(process, f"--model {name}: ", *words)


def test_the_cache_as_others_left_it(tmp_path):
    """Only downloads of this project found; pytorch_model.bin opened where there is no safetensors
    file (it is a pickle, and runs what it likes); Python code of the repository run."""
    folder = tmp_path / SNAPSHOT
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(SHA)
    for name in WANTED - {"vocab.json", "config.json"}:
        (folder / name).symlink_to(TOY / name)
    config = json.loads((TOY / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    opened = tmp_path / "opened"
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {opened}'\ntR.".encode())
    (folder / "modeling_evil.py").write_text(f"open({str(opened)!r}, 'w')\n")
    works(start(tmp_path, CLOSED, offline=1))
    (folder / "model.safetensors").unlink()
    fails(start(tmp_path, CLOSED, offline=1), str(folder), "model.safetensors")
    assert not opened.exists()
