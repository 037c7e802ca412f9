"""python -m pytest -q test_fuzz.py        2,000 damaged inputs from hypothesis, file by file, to the functions that read them.

A model folder, a data file and an adapter are other people's work. Whatever is in them, they are read or they are refused: with
InputError, in one line, within seconds, and nothing is written outside the folder at hand. TINYLORA_FUZZ=10 makes it ten times as many.
"""
import contextlib
import copy
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import pytest
import torch

import export
import gsm8k
import lora
import model as transformer
import template
import tinylora
import train
from files import InputError
from test_tinylora import TOY, tiny, write_folder

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

COUNTS = {"config.json": 400, "model.safetensors.index.json": 150, "model-00001-of-00002.safetensors": 250, "tokenizer_config.json": 250,
          "tokenizer.json": 150, "generation_config.json": 150, "tinylora.json": 100, "problems.jsonl": 250, "adapter.safetensors": 200, "lora/adapter_config.json": 100}
DEEP = {'"@900"': "[" * 900 + "]" * 900, '"@980"': '{"a":' * 980 + "1" + "}" * 980, '"@100000"': "[" * 100000 + "]" * 100000,
        '"@1e999"': "1e999", '"@digits"': "1" * 5000}  # what json.dumps does not write
NASTY = [None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 10**8, 2**31 - 1, 2**31, 2**63, 10**400, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"),
         "", "x", "1", "false", "\0", "\ud800", "a\nb\u2028c", "\x1b[31m", "../../etc/passwd", "/etc/passwd", ".", "..", "x" * 100000,
         [], [[]], [1, 2], [2**63], [None], {}, {"a": 1}, *(name.strip('"') for name in DEEP)]
NASTY += ["0", "-1", "3", "999999999", "1" * 30, "1_0", "structured", "lora-xs", "meta", "F64", "I8", "BOOL", "F8_E4M3", "C64", 3, 4, 13, 26, 32, 50]
TEMPLATES = ["{{ 'x' * 10**10 }}", "{{ '%9999999999d' % 1 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '\ud800' }}", "{% if %}", "{{ 10**10**4 }}",
             "{{ messages[0].content.__class__ }}", "{{ '{0.__class__}'.format(1) }}", "{% include 'x' %}", "{{ range(10**9)|list }}", "((" * 2000, "{{ [" * 300]


def places(value):
    """Every (container, key) of a JSON value."""
    for key in (list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        yield value, key
        yield from places(value[key])


def mutated(draw, value):
    """A JSON value with one to three places spoilt, as text."""
    value, pick = json.loads(json.dumps(value)), lambda choices: draw(st.sampled_from(choices))
    for _ in range(pick([1, 1, 1, 2, 3])):
        where = list(places(value))
        if not where:
            break
        container, key = pick(where)
        how = pick(["nasty"] * 6 + ["drop", "rename", "other", "times", "wrap"])
        if how == "drop":
            del container[key]
        elif how == "rename" and isinstance(container, dict):
            container[str(pick(NASTY))] = container.pop(key)
        elif how == "other":
            there = pick(where)
            container[key] = json.loads(json.dumps(there[0][there[1]])) if there[1] in there[0] or isinstance(there[0], list) and there[1] < len(there[0]) else None
        elif how == "times" and isinstance(container[key], (int, float)) and abs(container[key]) < 1e300:
            container[key] = container[key] * pick([-1, 2, 3, 0.5, 1000, 1e-9, 10**12])
        elif how == "wrap":
            container[key] = [container[key]]
        else:
            like = TEMPLATES if key == "chat_template" else [x for x in NASTY if type(x) is type(container[key])] or NASTY
            container[key] = copy.deepcopy(pick(pick([like, like, NASTY])))  # mostly of the same type, which gets further in
    text = json.dumps(value)
    for name, raw in DEEP.items():
        text = text.replace(name, raw)
    if isinstance(value, dict) and value and pick([False] * 9 + [True]):  # a key twice
        text = text[:-1] + f", {json.dumps(pick(list(value)))}: {json.dumps(pick(NASTY))}}}"
    return text


def spoilt(draw, data):
    """Bytes cut, flipped or pushed in; three times in four left alone."""
    how = draw(st.sampled_from(["keep"] * 15 + ["cut", "flip", "insert"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        return data[:at]
    if how == "flip" and data:
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1:]
    if how == "insert":
        return data[:at] + draw(st.sampled_from([b"\xff", b"\0", b"\xef\xbb\xbf", b"[" * 100000, b"\n", b"}", b'"'])) + data[at:]
    return data


def damaged(draw, name, data):
    """A file's bytes, damaged with its format in mind."""
    if name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        header = mutated(draw, json.loads(data[8:8 + size])).encode("utf-8", "surrogatepass")
        length = draw(st.sampled_from([len(header)] * 50 + [0, 1, len(header) - 1, len(header) + 1, 10**11, 2**63, 2**64 - 1]))
        return spoilt(draw, length.to_bytes(8, "little") + header + data[8 + size:])
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in data.decode().splitlines()]
        at = draw(st.integers(0, len(rows) - 1))
        return spoilt(draw, "\n".join(mutated(draw, row) if i == at else json.dumps(row) for i, row in enumerate(rows)).encode())
    return spoilt(draw, mutated(draw, json.loads(data)).encode())


watched = None  # the only folder in which files may be written, while one is given


def hook(event, values):
    if watched is None or event not in ("open", "os.mkdir", "os.remove", "os.rename", "os.symlink", "os.link", "os.truncate", "os.rmdir"):
        return
    if event == "open" and not (isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    if not isinstance(values[0], int) and values[0] != os.devnull and not os.path.abspath(os.fsdecode(values[0])).startswith(str(watched)):
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
    """A model folder with all that can lie in one, two shards, an adapter, a LoRA and a data file."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = tiny(vocab=576, kind="llama", scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32})
    write_folder(folder, model, shards=2)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"eos_token_id": [560], "layer_types": ["full_attention"] * 2, "use_sliding_window": False}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [560, 558], "temperature": 0.7}')
    (folder / "tinylora.json").write_text(json.dumps({"data": ".", "steps": 3, "lr": 0.05, "max-new-tokens": 9, "system": "Be brief.", "recompute": True, "tie": "tiled", "eval-count": 2}))
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, [
        {"question": "2 + 2?", "answer": "<<2+2=4>>4\n#### 4"}, {"problem": "$x$?", "answer": "\\frac{1}{2}", "solution": "so"}, {"question": "3?", "answer": 3}])))
    model = transformer.load(folder)
    tinylora.save(folder / "adapter.safetensors", tinylora.adapt(model, 13), model, "bf16", "toy")
    model = transformer.load(folder)
    lora.adapt(model, 2)
    lora.save(folder / "lora", model)
    return folder


def use(folder, name):
    """All that a run reads of such a file, and a first use of it."""
    if name == "tinylora.json":
        train.parse(["--model", str(folder)])
    elif name == "problems.jsonl":
        for row in gsm8k.read_problems(folder / name):
            assert set(gsm8k.score("so \\boxed{\\frac12} #### 4", row)) == set(gsm8k.SCORES)
            gsm8k.Chat(folder).prompt(row["prompt"])
    elif name.startswith("adapter"):
        train.parse(["--model", str(folder), "--adapter", str(folder / name)])
        export.show(folder / name)
        tinylora.load(folder / name, transformer.load(folder))
    elif name.startswith("lora"):
        export.show(folder / "lora")
        lora.load(folder / "lora", transformer.load(folder))
    else:
        model, chat = transformer.load(folder), gsm8k.Chat(folder)
        ids = [i for i in chat.prompt("What is 2 + 2?", "Be brief.") if i < model.config.vocab_size]
        with torch.no_grad():
            model(torch.tensor([ids[:8] or [1]]))
        chat.decode(torch.tensor([1, 2, 560]), torch.tensor([True, True, True]))


@pytest.mark.parametrize("name", COUNTS)
def test_damaged_files_are_read_or_refused(name, good, tmp_path):
    """Any exception but InputError, a message of two lines, more than 5 s, or a file written elsewhere, is a bug."""
    whole, seen = (good / name).read_bytes(), {"read": 0, "refused": 0}
    for other in COUNTS:
        assert (good / other).exists()
    use(good, name)

    @hypothesis.settings(max_examples=round(COUNTS[name] * float(os.environ.get("TINYLORA_FUZZ", 1))), deadline=None, derandomize="TINYLORA_FUZZ" not in os.environ,
                         database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def check(data):
        bad, start = damaged(data.draw, name, whole), time.time()
        (good / name).write_bytes(bad)
        try:
            with watching(good):
                use(good, name)
            seen["read"] += 1
        except InputError as error:
            seen["refused"] += 1
            assert str(error) and str(error).isprintable() and len(str(error)) < 3000, str(error)
        assert time.time() - start < 5

    try:
        check()
    finally:
        (good / name).write_bytes(whole)
    print(f"{name}: {seen}")


HOSTILE = {  # templates: what they try, and words of the message; on a slow machine the clock may be faster than the memory limit
    "count for ever": ("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}", "CPU"),
    "10 GB at once": ("{{ 'x' * 10**10 }}", "Memory|1024 MB"),
    "10 GB by doubling": ("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}", "Memory|1024 MB"),
    "10 GB by formatting": ("{{ '{:>9999999999}'.format(1) }}", "Memory|1024 MB"),
    "a prompt of 5 MB": ("{% for i in range(5000) %}{{ 'x' * 1000 }}{% endfor %}", "1,000,000"),
    "calling itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    "a deep expression": ("{{ " + "-" * 200000 + "1 }}", "Recursion"),
    "reading a file": ("{% include '/etc/passwd' %}", "loader"),
    "two lines of error": ("{{ raise_exception('one\ntwo\x1b[31m') }}", "one\\ntwo\\x1b[31m"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_are_stopped(name, good, tmp_path):
    """Bounded in time, memory and length, from another thread too; the next template works again, in 10 s at the most."""
    folder, start = shutil.copytree(good, tmp_path / "m"), time.time()
    (folder / "chat_template.jinja").write_text(HOSTILE[name][0])
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError) as error:
        pool.submit(lambda: gsm8k.Chat(folder).text("Q?")).result()
    assert any(words in str(error.value) for words in HOSTILE[name][1].split("|")) and str(error.value).isprintable()
    assert gsm8k.Chat(TOY).text("Q?").endswith("assistant\n") and time.time() - start < 10


def test_an_interrupted_rendering_is_not_the_next_ones_answer(monkeypatch):
    """Ctrl-C between question and answer: the answer must not be read as that to the next question."""
    assert template.render("{{ x }}", {"x": "first"}) == ["first", None]
    with monkeypatch.context() as m:
        m.setattr(template.child.stdout, "readline", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            template.render("{{ x }}", {"x": "second"})
    assert template.render("{{ x }}", {"x": "third"}) == ["third", None]


def resized(name, size):
    return lambda folder: (folder / name).touch() or os.truncate(folder / name, size)  # a hole: no disk is used


def rewritten(name, data):
    return lambda folder: (folder / name).unlink(missing_ok=True) or (folder / name).write_bytes(data)


def piped(name):
    return lambda folder: (folder / name).unlink(missing_ok=True) or os.mkfifo(folder / name)


def configured(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


ABSURD = {  # what is done to the folder, and a word of the message
    "a 2 GB tokenizer": (resized("tokenizer.json", 2 << 30), "2,147,483,648 bytes"),
    "a 2 GB config": (resized("config.json", 2 << 30), "2,147,483,648 bytes"),
    "a 2 GB template": (resized("chat_template.jinja", 2 << 30), "2,147,483,648 bytes"),
    "a pipe for a tokenizer": (piped("tokenizer.json"), "no such file"),
    "a pipe for a template": (piped("chat_template.jinja"), None),  # not a file: not there
    "a pipe for a shard": (piped("model-00001-of-00002.safetensors"), "not there"),
    "a template that is no text": (rewritten("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja"),
    "a header of 100 GB": (rewritten("model-00001-of-00002.safetensors", (100 << 30).to_bytes(8, "little") + b"{" * 100), "header too large"),
    "an offset of 10**18": (rewritten("model-00001-of-00002.safetensors", (63).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%d]}}' % 10**18 + b" " * 90), "damaged"),
    "10**8 layers": (configured(num_hidden_layers=10**8), "num_hidden_layers"),
    "256 layers": (configured(num_hidden_layers=256), "in no shard"),
    "a hidden size of 2**30": (configured(hidden_size=2**30), "hidden_size"),
    "all sizes at their limit": (configured(hidden_size=2**20, intermediate_size=2**20, vocab_size=2**20, num_attention_heads=2**20, head_dim=2**20, num_key_value_heads=2**20), "shape"),
    "a negative size": (configured(intermediate_size=-1), "intermediate_size"),
    "true for a number": (configured(num_attention_heads=True), "num_attention_heads"),
    "text for a number": (configured(vocab_size="576"), "vocab_size"),
    "text for a truth value": (configured(tie_word_embeddings="false"), "tie_word_embeddings"),
    "rope_theta 1e-300": (configured(rope_theta=1e-300), "rope_theta"),
    "rope_theta NaN": (configured(rope_theta=float("nan")), "rope_theta"),
    "rope_theta 0": (configured(rope_theta=0), "rope_theta"),
    "an infinite rope factor": (configured(rope_scaling={"rope_type": "llama3", "factor": float("inf"), "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32}), "factor"),
    "a rope that divides by 0": (configured(rope_scaling={"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 32}), "low_freq_factor"),
    "100,000 brackets": (rewritten("config.json", b"[" * 100000), "recursion"),
    "a shard elsewhere": (rewritten("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'), "own folder"),
    "a shard called ..": (rewritten("model.safetensors.index.json", b'{"weight_map": {"a": ".."}}'), "own folder"),
    "no tokens": (rewritten("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'), "no tokens"),
    "half a surrogate pair": (rewritten("tinylora.json", b'{"system": "\\ud800"}'), "surrogates"),
    "W&B from a model folder": (rewritten("tinylora.json", b'{"wandb": "mine"}'), "wandb"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_folders_are_refused_soon(name, good, tmp_path, capsys):
    """train.py itself: exit code 2 and one line, before anything of that size is read, built or waited for."""
    folder, start = shutil.copytree(good, tmp_path / "m"), time.time()
    ABSURD[name][0](folder)
    code = train.main(["--model", str(folder), "--data", str(TOY), "--eval-only", "--eval-count", "2", "--max-new-tokens", "4", "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert time.time() - start < 10
    if ABSURD[name][1] is None:
        assert code == 0, message
    else:
        assert code == 2 and message.startswith("error: ") and message.count("\n") == 1 and ABSURD[name][1] in message, message


def test_a_cache_of_links_still_loads(good, tmp_path):
    """The hub's cache is a folder of symbolic links to files outside it: links are followed, names in files are not."""
    (tmp_path / "m").mkdir()
    for path in good.glob("*.*"):
        (tmp_path / "m" / path.name).symlink_to(path)
    use(tmp_path / "m", "config.json")
