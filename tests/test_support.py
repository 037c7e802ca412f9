"""python -m pytest -q tests/test_support.py

Files, model folders, templates and chat formats: no model is built. Docstrings name the bug.
"""
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # before the imports

import pytest
import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer

from support import sandbox
from support.chat_format import Chat
from support.checkpoint import read_config, shard_files
from support.errors import InputError
from support.files import read_jsonl, read_text, replacing, sorted_header, write_json
from support.hub import find_model

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
ASSETS = Path(os.environ.get("TINYLORA_ASSETS") or "/nonexistent")
needs_assets = pytest.mark.skipif(
    not ASSETS.is_dir(), reason="needs the data folder named by TINYLORA_ASSETS")


def copy_toy(folder, **texts):
    """The toy's text side, with other contents for some of its files ("__" stands for ".")."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOY / name).read_bytes())
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


# ---- files and checkpoint


@pytest.mark.parametrize("read", [read_text, read_jsonl])
def test_a_pipe_is_refused(read, tmp_path):
    """A named pipe without a writer: opening it would wait forever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no such file.*not an ordinary file"):
        list(read(tmp_path / "pipe"))
    with pytest.raises(InputError, match="no such file$"):
        list(read(tmp_path / "nothing"))


def test_too_large_and_not_text(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(path)
    os.truncate(path, 2 << 30)  # a hole, no disk is used
    with pytest.raises(InputError, match="2,147,483,648 bytes"):
        read_text(path)


def test_jsonl_names_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\u2028"}\n\n{"b": 1}\n')
    assert list(read_jsonl(path)) == [(1, {"a": "\u2028"}), (3, {"b": 1})]
    for text, words in (('{}\n{bad\n', "line 2: not JSON"), ("{}\n\n[1]\n", "line 3: is not"),
                        ('{"a": "\\ud800"}', "line 1: not JSON"), ("[" * 100000, "line 1: not")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            list(read_jsonl(path))


def test_rows_are_appended_all_or_none(tmp_path):
    """Half a row on a full disk: the size of a file is limited to 100 bytes here."""
    script = ("import resource, signal\n"
              "from support.files import append_jsonl\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
              "append_jsonl('log.jsonl', [{'step': 1}])\n"
              "append_jsonl('log.jsonl', [{'step': 2}, {'text': 'x' * 200}])\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "log.jsonl: cannot be written" in done.stderr and "--resume" in done.stderr
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(InputError, match="a.json: cannot be written .*full"):
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("the disk is full")
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_equal_adapters_are_equal_bytes(tmp_path):
    """safetensors writes the metadata in an order that differs between processes."""
    tensors = {"v": torch.arange(13.0), "a": torch.ones(3)}
    metadata = {name: "x" * i for i, name in enumerate("qwertyuiop")}
    files = {sorted_header(save(tensors, dict(order)))
             for order in (metadata.items(), reversed(metadata.items()))}
    assert len(files) == 1
    (tmp_path / "a").write_bytes(files.pop())
    assert torch.equal(load_file(tmp_path / "a")["v"], tensors["v"])


CONFIGS = {  # changes to the toy's config.json, a word of the message
    "no architecture": ({"model_type": None}, "model_type"),
    "unknown architecture": ({"model_type": "gpt2"}, "gpt2"),
    "missing field": ({"hidden_size": None}, "hidden_size is missing"),
    "negative": ({"num_hidden_layers": -3}, "whole number from 1 to 256"),
    "10**8 layers": ({"num_hidden_layers": 10**8}, "num_hidden_layers"),
    "a hidden size of 2**30": ({"hidden_size": 2**30}, "hidden_size"),
    "true for a number": ({"num_attention_heads": True}, "num_attention_heads"),
    "text for a number": ({"vocab_size": "576"}, "vocab_size"),
    "text for a truth value": ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "heads do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "an odd head": ({"head_dim": 31}, "rotary"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "sliding window": ({"use_sliding_window": True}, "use_sliding_window"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "llama's bias": ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
    "rope_theta NaN": ({"rope_theta": float("nan")}, "rope_theta"),
    "rope_theta 0": ({"rope_theta": 0}, "rope_theta"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    "rope_scaling is text": ({"rope_scaling": "x"}, "rope_scaling"),
    "llama3 without factor": ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
    "a rope that divides by 0": ({"rope_scaling": {
        "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
        "original_max_position_embeddings": 32}}, "low_freq_factor"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_absurd_configs_are_refused(name, tmp_path):
    changes, words = CONFIGS[name]
    raw = json.loads((TOY / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="config.json: ") as error:
        read_config(tmp_path)
    assert words in str(error.value) and str(error.value).isprintable()


def test_a_config_does_not_depend_on_its_spelling(tmp_path):
    """10000 and 10000.0, null and absent, transformers 4 and 5 are one Config."""
    raw = json.loads((TOY / "config.json").read_text())
    raw.pop("rope_parameters", None)
    variants = [raw | {"rope_theta": 10000}, raw | {"rope_theta": 10000.0, "rope_scaling": None},
                raw | {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0}}]
    configs = []
    for variant in variants:
        (tmp_path / "config.json").write_text(json.dumps(variant))
        configs.append(repr(read_config(tmp_path)))
    assert len(set(configs)) == 1


def test_a_missing_or_wandering_shard_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name, words in (("a.safetensors", "a.safetensors.*not there"), ("../../etc/passwd", "own"),
                        ("/etc/passwd", "own folder"), ("..", "own folder")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match=words):
            shard_files(tmp_path)
    os.mkfifo(tmp_path / "a.safetensors")  # a pipe for a shard
    index.write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(InputError, match="not there"):
        shard_files(tmp_path)


def test_what_is_no_folder_and_no_hub_name():
    assert find_model(str(TOY)) == str(TOY)
    for name in ("nowhere", "/no/where", "./a/b", "~/model"):
        with pytest.raises(InputError, match="no such folder"):
            find_model(name)


# ---- template and chat_format

HOSTILE = {  # templates and words of the message; a slow machine may reach the time limit first
    "count forever": ("{% for a in range(99999) %}{% for b in range(99999) %}"
                      "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}", "CPU"),
    "10 GB at once": ("{{ 'x' * 10**10 }}", "Memory|640 MB"),
    "10 GB by doubling": ("{% set n = namespace(s='x') %}{% for i in range(60) %}"
                          "{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}", "Memory|640 MB"),
    "10 GB by formatting": ("{{ '{:>9999999999}'.format(1) }}", "Memory|640 MB"),
    "a prompt of 5 MB": ("{% for i in range(5000) %}{{ 'x' * 1000 }}{% endfor %}", "1,000,000"),
    "calling itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    "a deep expression": ("{{ " + "-" * 200000 + "1 }}", "Recursion"),
    "reading a file": ("{% include '/etc/passwd' %}", "loader"),
    "two lines of error": (r"{{ raise_exception('one\ntwo\x1b[31m') }}", r"one\ntwo\x1b[31m"),
    "Python's classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "template fails"),
    "changing its input": ("{{ messages.append(1) }}", "template fails"),
    "no grammar": ("{% if %}", "template fails"),
    "global variables": ("{{ cycler.__init__.__globals__ }}", "template fails"),
    "a division by 0": ("{{ 1 / 0 }}", "template fails"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_are_stopped(name, tmp_path):
    """Bounded in time, memory and length, from another thread too; the next template works."""
    start = time.time()
    source, words = HOSTILE[name]
    folder = copy_toy(tmp_path / "m", chat_template__jinja=source)
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError) as error:
        pool.submit(lambda: Chat(folder).text("Q?")).result()
    assert any(word in str(error.value) for word in words.split("|"))
    assert str(error.value).isprintable()
    assert Chat(TOY).text("Q?").endswith("assistant\n") and time.time() - start < 10


def test_an_interrupted_rendering_is_not_the_next_ones_answer(monkeypatch):
    """Ctrl-C between question and answer: the answer must not be read as the next one."""
    def interrupt():
        raise KeyboardInterrupt
    assert sandbox.render("{{ x }}", {"x": "first"}) == ["first", None]
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.child.stdout, "readline", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sandbox.render("{{ x }}", {"x": "second"})
    assert sandbox.render("{{ x }}", {"x": "third"}) == ["third", None]


def test_stop_ids_come_from_everywhere(tmp_path):
    """Bug 3: two config files (a list or one id), the tokenizer's eos_token, the known names."""
    tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
    ends = {tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert Chat(TOY).stop_ids == ends
    config = json.loads((TOY / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "Q"}
    config["chat_template"] = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ eos_token }}{{ messages[0].content }}"}]
    folder = copy_toy(tmp_path / "m", tokenizer_config__json=json.dumps(config),
                      generation_config__json='{"eos_token_id": [7, 9, true, -1, 10000000]}',
                      config__json='{"eos_token_id": 11}')
    chat = Chat(folder)
    assert chat.stop_ids == ends | {7, 9, 11, tokenizer.token_to_id("Q")}
    assert chat.text("x") == "Qx"
    (folder / "chat_template.jinja").write_text("jinja file: {{ messages[0].content }}")
    assert Chat(folder).text("x") == "jinja file: x"


@needs_assets
def test_real_qwen_template_and_stop_ids():
    """Bugs 3, 20: both stop ids of Qwen2.5, 151,665 real ids, with and without a system message."""
    chat = Chat(ASSETS / "qwen2.5")
    assert chat.stop_ids == {151645, 151643} and chat.vocab == 151665
    assert chat.text("Q?") == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n")
    assert chat.text("Q?", "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert chat.prompt("Q?")[:3] == [151644, 8948, 198]


def test_text_after_the_stop_token_is_not_decoded():
    """Bug 4: neither the stop token nor what follows it reaches the scorer."""
    chat = Chat(TOY)
    tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode("#### 12<|im_end|>#### 99").ids)
    mask = torch.arange(len(ids)) <= ids.tolist().index(tokenizer.token_to_id("<|im_end|>"))
    assert chat.decode(ids, mask) == "#### 12"
    with pytest.raises(ValueError, match="decode takes one row"):  # two rows became one text
        chat.decode(ids[None], mask[None])


def test_the_fingerprint_is_of_all_that_prompts_depend_on(tmp_path):
    same = Chat(copy_toy(tmp_path / "a")).fingerprint()
    assert same == Chat(TOY).fingerprint() and len(same) == 64
    config = json.loads((TOY / "tokenizer_config.json").read_text())
    changes = [
        {"chat_template__jinja": config["chat_template"] + " "},
        {"tokenizer__json": (TOY / "tokenizer.json").read_text() + " "},
        {"tokenizer_config__json": json.dumps(config | {"bos_token": "x"})},
        {"generation_config__json": '{"eos_token_id": 7}'}]
    prints = {Chat(copy_toy(tmp_path / str(i), **change)).fingerprint()
              for i, change in enumerate(changes)}
    assert len(prints | {same}) == 5
