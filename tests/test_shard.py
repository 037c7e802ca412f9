"""--shard: ranks that hold parts of one model do what one does with the whole."""
import json
import os
import random
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from helpers import ROOT, config, one_error, read_rows, tiny, write_folder
from test_ranks import assert_close

import train
from fast import shard
from support import ranks
from support.errors import InputError

RUN = ["--prompts", "4", "--group", "4", "--minibatches", "2", "--seed", "3", "--steps", "3",
       "--lr", "0.001", "--reward", "format", "--max-new-tokens", "16", "--eval-count", "4"]

PART = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import numpy as np, torch
import fast, grpo, model as transformer, tinylora
from fast import shard
from helpers import random_v, rollout, to_double
from support import ranks

ranks.join("cpu", shard=True)
torch.set_num_threads(1)
result = []
for engine in (grpo, fast):
    for method, kind in (("tinylora", "top"), ("lora-xs", "top"), ("tinylora", "random")):
        kept = []
        for load, solver in ((transformer.load, engine), (shard.load, shard.in_parts(engine))):
            model = load({folder!r}, torch.float64)
            v = tinylora.adapt(model, 13 if method == "tinylora" else None, method=method,
                               svd=solver.svd, directions=kind)
            to_double(model)
            random_v(v, 0.1)
            data = rollout(model, engine=engine)
            logp = engine.logprobs(model, data, recompute=True)
            weight = torch.from_numpy(np.random.RandomState(9).standard_normal(logp.shape))
            v.grad, = torch.autograd.grad((logp * weight).sum(), v)
            if len(kept):
                ranks.add_gradients([v])
            kept.append([data.ids, data.mask, data.logp, logp.detach(), v.grad,
                         model.adapter["base"]])
        (ids, mask, *floats, base), (ids2, mask2, *floats2, base2) = kept
        result.append(dict(
            same=torch.equal(ids, ids2) and torch.equal(mask, mask2) and base == base2,
            error=max((a - b).abs().max().item() for a, b in zip(floats, floats2)),
            ends=mask.sum(1).tolist(), gradient=floats[2].abs().max().item()))
# not printed: one pipe would mix the two ranks' lines
with open({folder!r} + f"/part-{{ranks.RANK}}.json", "w") as file:
    json.dump(result, file)
ranks.leave()
"""


def torchrun(n, *words):
    command = [sys.executable, "-u", "-m", "torch.distributed.run", "--nproc_per_node", str(n),
               "--master_port", str(random.randint(20000, 40000)), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_part_gives_the_numbers_of_the_whole(tmp_path):
    """Both engines, TinyLoRA (random directions too) and LoRA-XS, in fp64: the same tokens,
    log-probs, gradient in v and fingerprint; biases, an untied head, grouped queries."""
    folder = write_folder(tmp_path / "model", tiny(heads=8, kv=2, tied=False))
    script = tmp_path / "part.py"
    script.write_text(PART.format(root=str(ROOT), folder=str(folder)))
    process = torchrun(2, script)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    for rank in (0, 1):
        cases = json.loads((folder / f"part-{rank}.json").read_text())
        assert len(cases) == 6
        for case in cases:
            assert case["same"] and case["error"] < 1e-9, case
            assert case["gradient"] > 1e-3 and len(set(case["ends"])) > 1


def test_two_ranks_train_one_model(tmp_path, capsys):
    """train.py: the same texts, log and v after 3 steps of the toy; a rank holds 0.6 of its weights
    at most."""
    process = torchrun(2, "train.py", "--shard", *RUN, "--out", tmp_path / "two")
    assert train.main([*RUN, "--out", str(tmp_path / "one")]) == 0
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    one = tmp_path / "one"
    two = tmp_path / "two"
    v, w = (load_file(out / "adapter.safetensors")["v"] for out in (one, two))
    assert v.any() and (v - w).abs().max() < 1e-6
    assert read_rows(one / "samples.jsonl") == read_rows(two / "samples.jsonl")
    for a, b in zip(read_rows(one / "log.jsonl"), read_rows(two / "log.jsonl"), strict=True):
        assert_close(a, b)
    whole, part = (int(text.split("load: ")[1].split()[0].replace(",", ""))
                   for text in (capsys.readouterr().out, output))
    assert part < 0.6 * whole  # 0.54; the table of 576 tokens is whole on both


def test_mistakes(tmp_path, capsys, monkeypatch):
    for words in ([], ["--method", "lora"], ["--algo", "es"]):
        assert train.main(["--shard", *words, "--out", str(tmp_path / "a")]) == 2
        one_error(capsys, "--shard")
    monkeypatch.setattr(ranks, "SIZE", 3)
    with pytest.raises(InputError, match="num_attention_heads 4 cannot be cut into 3"):
        shard.part_of(config())
