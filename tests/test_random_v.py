"""tools/random_v.py: random values of v, the best one kept."""
import json

import numpy as np
import pytest
import torch

from helpers import one_error

import tinylora
import train
from tools import random_v


def test_the_best_is_kept_and_scores_are_those_of_its_v(tmp_path, monkeypatch, capsys):
    """The evaluation is replaced: it scores v itself, which must be the drawn one while it runs."""
    seen = []

    def evaluate(run, problems, label, step, sampled=False):
        v = run.model.layers[0].self_attn.q_proj.v
        seen.append(v.detach().flatten().clone())
        return {"strict": v.flatten()[0].item(), "lenient": 0.0}

    monkeypatch.setattr(train, "evaluate", evaluate)
    words = [str(tmp_path / "out"), "--count", "3", "--sd", "0.5", "--seed", "7", "--problems", "2",
             "--", "--params", "4"]
    assert random_v.main(words) == 0
    drawn = [np.random.RandomState([10, 7, i, 0]).standard_normal((4, 1)) * 0.5 for i in range(3)]
    assert not seen[0].any()
    for value, expected in zip(seen[1:], drawn):
        assert value.tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-6)
    found = json.loads((tmp_path / "out" / "random_v.json").read_text())
    assert found["base"] == 0 and found["problems"] == 2 and found["flags"] == ["--params", "4"]
    scores = [v["score"] for v in found["v"]]
    assert scores == pytest.approx([float(v[0, 0]) for v in drawn], rel=1e-6)
    stored, settings = tinylora.read(tmp_path / "out" / "adapter.safetensors")
    best = drawn[int(np.argmax(scores))]
    assert torch.equal(stored, torch.from_numpy(best).float().flatten())
    assert settings["seed"] == 0
    assert f"best {max(scores):.3f}, {sum(s > 0 for s in scores)} above" in capsys.readouterr().out


def test_what_has_no_v_is_refused(tmp_path, capsys):
    assert random_v.main([str(tmp_path / "x"), "--", "--method", "lora"]) == 2
    one_error(capsys, "--method lora has no v")
    assert random_v.main([str(tmp_path / "x"), "--", "--parms", "13"]) == 2
    one_error(capsys, "unrecognized arguments: --parms")
    assert random_v.main([str(tmp_path / "x"), "--", "--eval-only"]) == 2
    one_error(capsys, "leave out --eval-only")
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter.safetensors").write_text("a trained one")
    assert random_v.main([str(run), "--", "--params", "13"]) == 2
    one_error(capsys, "exists already")
    assert (run / "adapter.safetensors").read_text() == "a trained one"
    (tmp_path / "file").write_text("")
    assert random_v.main([str(tmp_path / "file"), "--", "--params", "13"]) == 2
    one_error(capsys, "cannot be made a folder")
