"""What several test files need: small random models, model folders, rollouts. Import it first."""
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the CPU's, and ask no hub
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import grpo
import tinylora
from model import Transformer
from support.checkpoint import Config

ASSETS = Path(os.environ.get("TINYLORA_ASSETS") or "/nonexistent")
needs_assets = pytest.mark.skipif(
    not ASSETS.is_dir(), reason="needs the data folder named by TINYLORA_ASSETS")
TINY_RUN = ["--steps", "2", "--prompts", "4", "--group", "4", "--max-new-tokens", "24",
            "--eval-count", "8"]  # train.py on the toy, a second or two

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
# grouped queries 2 to 1, none, 7 to 1; an untied head; Llama 3; other sizes
MODELS = [dict(), dict(kv=4), dict(heads=7, kv=1, head_dim=6), dict(tied=False),
          dict(kind="llama", scaling=LLAMA3, theta=5e5), dict(theta=1e6, head_dim=16)]


def config(kind="qwen2", layers=2, hidden=32, mid=48, heads=4, kv=2, head_dim=8, vocab=50,
           theta=10000.0, tied=True, scaling=None):
    return Config(kind, vocab, hidden, mid, layers, heads, kv, head_dim, 1e-6, theta, scaling, tied)


@torch.no_grad()
def tiny(seed=0, dtype=torch.float32, **kw):
    """A random model; norm weights and biases are random too, or their bugs would not show."""
    model = Transformer(config(**kw))
    rng = np.random.RandomState(seed)
    for name, p in model.named_parameters():
        scale = 0.3 if p.dim() == 2 else 0.5
        p.copy_(torch.from_numpy(rng.standard_normal(p.shape)) * scale)
        if "norm" in name:
            p += 1.0
    return model.to(dtype).requires_grad_(False).eval()


def to_double(model):
    """Adapters in fp64 too (they are fp32 on any model), so that gradients are exact to 1e-10."""
    for p in model.parameters():
        p.data = p.data.double()
    for module in model.modules():
        if isinstance(module, tinylora.TinyLoRALinear):
            module.P = module.P.double()
    return model


def random_v(v, scale=0.3, seed=0):
    with torch.no_grad():
        v.copy_(torch.from_numpy(np.random.RandomState(seed).standard_normal(v.shape)) * scale)
    return v


def arrives(y, base, change):
    """How much of a change (N, d_out), in fp64, is in y less base: 1 when all of it is there."""
    return ((y.double() - base.double()) * change).sum() / change.square().sum()


def rollout(model, prompts=((1, 2, 3, 4, 5), (6, 7, 8), (9, 10)), group=4, length=12,
            temperature=1.0, stops=(0, 3), seed=0, engine=grpo, **kw):
    """A ragged batch, some of whose rows stop early."""
    noise = np.random.RandomState(seed).random_sample((len(prompts) * group, length))
    prompts = [list(prompt) for prompt in prompts]
    return engine.generate(model, prompts, group, length, stops, temperature, noise, **kw)


def check_logprobs(model, params, data, engine):
    """The engine gives a rollout's log-probs and their gradient as the plain one does, to 1e-10;
    with recomputing the same bits as without."""
    weight = torch.from_numpy(np.random.RandomState(9).standard_normal(data.mask.shape))
    results = []
    for module, recompute in ((grpo, False), (engine, False), (engine, True)):
        logp = module.logprobs(model, data, recompute)
        results.append([logp.detach(), *torch.autograd.grad((logp * weight).sum(), params)])
    assert results[0][1].abs().max() > 0.01
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(*results[1:]))


def write_folder(folder, model, shards=1):
    """A model folder in Hugging Face's layout, with the toy's tokenizer files."""
    c = model.config
    raw = {"model_type": c.model_type, "architectures": ["Qwen2ForCausalLM"],
           "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
           "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers,
           "hidden_act": "silu", "num_attention_heads": c.num_attention_heads,
           "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
           "attention_bias": False, "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta,
           "tie_word_embeddings": c.tie_word_embeddings}
    if c.rope_scaling:
        raw["rope_scaling"] = {"rope_type": "llama3"} | c.rope_scaling
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOY / name, folder / name)
    state = {name if name.startswith("lm_head") else "model." + name: p.detach().clone()
             for name, p in model.state_dict().items()}
    names = sorted(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in names[i::shards]}, folder / file)
        index |= {name: file for name in names[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def needs(*packages):
    """A mark: skip the test where one of the packages of requirements-dev.txt is missing."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    reason = f"needs {', '.join(missing)} (requirements-dev.txt)"
    return pytest.mark.skipif(bool(missing), reason=reason)


def read_rows(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_error(capsys, *words):
    """What a program that ended with exit code 2 said: one line, which holds the words."""
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert all(word in message for word in words), message
