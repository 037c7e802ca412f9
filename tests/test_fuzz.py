"""2,000 damaged inputs from hypothesis, file by file, to the functions that read them.

A model folder, a data file and an adapter are other people's work. Whatever is in them, they are
read or refused: with InputError, in one line, within seconds, and nothing is written outside the
folder. TINYLORA_FUZZ=10 makes ten times as many.
"""
import contextlib
import copy
import json
import os
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from helpers import LLAMA3, TINY_RUN, TOY, one_error, tiny, write_folder

import gsm8k
import model as transformer
import tinylora
import train
from methods import lora
from support.chat_format import Chat
from support.errors import InputError
from support.flags import parse
from tools import export

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SHARD = "model-00001-of-00002.safetensors"
COUNTS = {"config.json": 400, "model.safetensors.index.json": 150, SHARD: 250,
          "tokenizer_config.json": 250, "tokenizer.json": 150, "generation_config.json": 150,
          "tinylora.json": 100, "problems.jsonl": 250, "adapter.safetensors": 200,
          "lora/adapter_config.json": 100}
# What json.dumps does not write: these strings are replaced in its text.
RAW = {'"@900"': "[" * 900 + "]" * 900, '"@980"': '{"a":' * 980 + "1" + "}" * 980,
       '"@100000"': "[" * 100000 + "]" * 100000, '"@1e999"': "1e999", '"@digits"': "1" * 5000}
NASTY = [None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 10**8, 2**31 - 1, 2**31, 2**63, 10**400,
         1e308, 1e-320, float("nan"), float("inf"), -float("inf"), "", "x", "1", "false", "\0",
         "\ud800", "a\nb\u2028c", "\x1b[31m", "../../etc/passwd", "/etc/passwd", ".", "..",
         "x" * 100000, [], [[]], [1, 2], [2**63], [None], {}, {"a": 1},
         *(name.strip('"') for name in RAW), "0", "-1", "3", "999999999", "1" * 30, "1_0",
         "structured", "lora-xs", "meta", "F64", "I8", "BOOL", "F8_E4M3", "C64", 3, 4, 13, 26, 32,
         50]
TEMPLATES = ["{{ 'x' * 10**10 }}", "{{ '%9999999999d' % 1 }}", "{{ '\ud800' }}", "{% if %}",
             "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 10**10**4 }}", "",
             "{{ messages[0].content.__class__ }}", "{{ '{0.__class__}'.format(1) }}",
             "{% include 'x' %}", "{{ range(10**9)|list }}", "((" * 2000, "{{ [" * 300]


def places(value):
    """Every (container, key) of a JSON value."""
    keys = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from places(value[key])


def spoil(pick, value):
    """Change one place of a JSON value."""
    where = list(places(value))
    if not where:
        return
    container, key = pick(where)
    old = container[key]
    how = pick(["nasty"] * 6 + ["drop", "rename", "other", "times", "wrap"])
    if how == "drop":
        del container[key]
    elif how == "rename" and isinstance(container, dict):
        container[str(pick(NASTY))] = container.pop(key)
    elif how == "other":
        other, other_key = pick(where)
        container[key] = copy.deepcopy(other[other_key])
    elif how == "times" and isinstance(old, (int, float)) and abs(old) < 1e300:
        container[key] = old * pick([-1, 2, 3, 0.5, 1000, 1e-9, 10**12])
    elif how == "wrap":
        container[key] = [old]
    else:  # mostly of the same type, which gets further in
        same_type = [x for x in NASTY if type(x) is type(old)] or NASTY
        like = TEMPLATES if key == "chat_template" else same_type
        container[key] = copy.deepcopy(pick(pick([like, like, NASTY])))


def mutated(rng, value):
    """A JSON value with one to three places changed, as text. rng: a random.Random."""
    pick = rng.choice
    value = copy.deepcopy(value)
    for _ in range(pick([1, 1, 1, 2, 3])):
        spoil(pick, value)
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(name, raw)
    if isinstance(value, dict) and value and pick([False] * 9 + [True]):  # a key twice
        text = text[:-1] + f", {json.dumps(pick(list(value)))}: {json.dumps(pick(NASTY))}}}"
    return text


def cut_or_flipped(rng, data):
    """Bytes cut, flipped or pushed in; in five of six cases left alone."""
    how = rng.choice(["keep"] * 15 + ["cut", "flip", "insert"])
    at = rng.randint(0, max(0, len(data) - 1))
    if how == "cut":
        return data[:at]
    if how == "flip" and data:
        return data[:at] + bytes([data[at] ^ rng.randint(1, 255)]) + data[at + 1:]
    if how == "insert":
        pieces = [b"\xff", b"\0", b"\xef\xbb\xbf", b"[" * 100000, b"\n", b"}", b'"']
        return data[:at] + rng.choice(pieces) + data[at:]
    return data


def damaged(rng, name, data):
    """A file's bytes, damaged with its format in mind."""
    if name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        if rng.random() < 0.1:  # a weight: almost every damage of a header is refused
            at = rng.randrange(8 + size, len(data))
            return data[:at] + bytes([data[at] ^ rng.randint(1, 255)]) + data[at + 1:]
        header = mutated(rng, json.loads(data[8:8 + size])).encode("utf-8", "surrogatepass")
        n = len(header)
        lengths = [n] * 50 + [0, 1, n - 1, n + 1, 10**11, 2**63, 2**64 - 1]
        length = rng.choice(lengths).to_bytes(8, "little")
        return cut_or_flipped(rng, length + header + data[8 + size:])
    if name.endswith(".jsonl"):
        lines = data.decode().splitlines()
        at = rng.randint(0, len(lines) - 1)
        lines[at] = mutated(rng, json.loads(lines[at]))
        return cut_or_flipped(rng, "\n".join(lines).encode())
    return cut_or_flipped(rng, mutated(rng, json.loads(data)).encode())


watched = None  # the only folder in which files may be written, while one is given
WRITES = ("os.mkdir", "os.remove", "os.rename", "os.symlink", "os.link", "os.truncate", "os.rmdir")


def hook(event, values):
    """Called by Python itself at every file operation of this process."""
    if watched is None or event not in ("open", *WRITES):
        return
    if event == "open":
        flags = values[2]
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    if isinstance(values[0], int) or values[0] == os.devnull:
        return
    if not os.path.abspath(os.fsdecode(values[0])).startswith(str(watched)):
        raise AssertionError(f"{event} {values} outside {watched}")


sys.addaudithook(hook)


@contextlib.contextmanager
def watching(folder):
    global watched
    watched = folder
    try:
        yield
    finally:
        watched = None


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model folder with all that one can hold: two shards, an adapter, a LoRA, a data file."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_folder(folder, tiny(vocab=576, kind="llama", scaling=LLAMA3), shards=2)
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": [560], "layer_types": ["full_attention"] * 2,
               "use_sliding_window": False}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [560, 558], "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tinylora.json").write_text(json.dumps({
        "data": ".", "steps": 3, "lr": 0.05, "max-new-tokens": 9, "system": "Be brief.",
        "recompute": True, "tie": "tiled", "eval-count": 2}))
    problems = [{"question": "2 + 2?", "answer": "<<2+2=4>>4\n#### 4"},
                {"problem": "$x$?", "answer": "\\frac{1}{2}", "solution": "so"},
                {"question": "3?", "answer": 3}]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    model = transformer.load(folder)
    v = tinylora.adapt(model, 13)
    tinylora.save(folder / "adapter.safetensors", v, model, "bf16", "toy")
    model = transformer.load(folder)
    lora.adapt(model, 2)
    lora.save(folder / "lora", model)
    return folder


def parsed(*flags):
    return parse(list(flags), train.__doc__, train.RECIPE, train.LR)


def use(folder, name):
    """All that a run reads of such a file, and a first use of it."""
    if name == "tinylora.json":
        parsed("--model", str(folder))
    elif name == "problems.jsonl":
        chat = Chat(folder)
        for row in gsm8k.read_problems(folder / name):
            scores = gsm8k.score("so \\boxed{\\frac12} #### 4", row)
            assert list(scores) == ["strict", "lenient", "format"]
            chat.prompt(gsm8k.prompt(row))
    elif name.startswith("adapter"):
        parsed("--model", str(folder), "--adapter", str(folder / name))
        export.show(SimpleNamespace(adapter=str(folder / name)))
        tinylora.load(folder / name, transformer.load(folder))
    elif name.startswith("lora"):
        export.show(SimpleNamespace(adapter=str(folder / "lora")))
        lora.load(folder / "lora", transformer.load(folder))
    else:
        model = transformer.load(folder)
        chat = Chat(folder)
        ids = chat.prompt("What is 2 + 2?", "Be brief.")
        ids = [i for i in ids if i < model.config.vocab_size][:8] or [1]
        with torch.no_grad():
            model(torch.tensor([ids]))
        chat.decode(torch.tensor([1, 2, 560]), torch.tensor([True, True, True]))


@pytest.mark.parametrize("name", COUNTS)
def test_damaged_files_are_read_or_refused(name, good):
    """A bug is: any exception but InputError, a message of two lines, more than 20 s, a file
    written elsewhere. Some of the damages must be harmless and some not, or nothing is tested."""
    whole = (good / name).read_bytes()
    seen = {"read": 0, "refused": 0}
    use(good, name)
    factor = float(os.environ.get("TINYLORA_FUZZ", 1))

    @hypothesis.settings(max_examples=round(COUNTS[name] * factor), deadline=None, database=None,
                         derandomize="TINYLORA_FUZZ" not in os.environ,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.randoms(use_true_random=False))
    def check(rng):
        (good / name).write_bytes(damaged(rng, name, whole))
        start = time.time()
        try:
            with watching(good):
                use(good, name)
            seen["read"] += 1
        except InputError as error:
            seen["refused"] += 1
            text = str(error)
            assert text and text.isprintable() and len(text) < 3000, text
        assert time.time() - start < 20

    try:
        check()
    finally:
        (good / name).write_bytes(whole)
    assert min(seen.values()) > 0, seen


def resized(name, size):
    def damage(folder):
        (folder / name).touch()
        os.truncate(folder / name, size)  # a hole: no disk is used
    return damage


def rewritten(name, data):
    def damage(folder):
        (folder / name).write_bytes(data)
    return damage


def piped(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    return damage


def configured(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
    return damage


LARGEST = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
                         "head_dim", "num_key_value_heads"), 2**20)
FAR = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%d]}}' % 10**18
ABSURD = {  # what is done to the folder, words of the message (None: it is read all the same)
    "a 2 GB tokenizer": (resized("tokenizer.json", 2 << 30), "2,147,483,648 bytes"),
    "a 2 GB template": (resized("chat_template.jinja", 2 << 30), "2,147,483,648 bytes"),
    "a pipe for a tokenizer": (piped("tokenizer.json"), "no such file"),
    "a pipe for a template": (piped("chat_template.jinja"), None),
    "a pipe for a shard": (piped(SHARD), "not there"),
    "a template that is no text": (rewritten("chat_template.jinja", b"\xff"), "chat_template"),
    "a header of 100 GB": (rewritten(SHARD, (100 << 30).to_bytes(8, "little") + b"{" * 100),
                           "its header has"),
    "an offset of 10**18": (rewritten(SHARD, len(FAR).to_bytes(8, "little") + FAR + b" " * 90),
                            "damaged"),
    "256 layers": (configured(num_hidden_layers=256), "in no shard"),
    "all sizes at their limit": (configured(**LARGEST), "shape"),
    "100,000 brackets": (rewritten("config.json", b"[" * 100000), "recursion"),
    "no tokens": (rewritten("tokenizer.json", b'{"version": "1.0", "model": '
                            b'{"type": "BPE", "vocab": {}, "merges": []}}'), "no tokens"),
    "half a surrogate pair": (rewritten("tinylora.json", b'{"system": "\\ud800"}'), "surrogates"),
    "W&B from a model folder": (rewritten("tinylora.json", b'{"wandb": "mine"}'), "wandb"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_folders_are_refused_soon(name, good, tmp_path, capsys):
    """Before anything of that size is read, built or waited for."""
    folder = shutil.copytree(good, tmp_path / "m")
    damage, words = ABSURD[name]
    damage(folder)
    start = time.time()
    flags = ["--eval-only", "--data", str(TOY), "--eval-count", "2", "--max-new-tokens", "4"]
    code = train.main(["--model", str(folder), *flags, "--out", str(tmp_path / "out")])
    assert time.time() - start < 20
    if words is None:
        assert code == 0
    else:
        assert code == 2
        one_error(capsys, words)


def test_a_pipe_for_an_adapter(tmp_path, capsys):
    """It waited for a writer for ever, and ignored Ctrl-C."""
    os.mkfifo(tmp_path / "pipe")
    flags = ["--adapter", str(tmp_path / "pipe"), "--out", str(tmp_path / "out")]
    assert train.main([*TINY_RUN, *flags]) == 2
    one_error(capsys, "no such file")


def test_a_cache_of_links_still_loads(good, tmp_path):
    """The hub's cache is a folder of symbolic links to files outside it: these are followed."""
    (tmp_path / "m").mkdir()
    for path in good.glob("*.*"):
        (tmp_path / "m" / path.name).symlink_to(path)
    use(tmp_path / "m", "config.json")
