"""tools/shuffled.py: the control whose rewards say nothing of the responses."""
import json

import numpy as np
import pytest
import torch

from helpers import TOY, one_error

import grpo
import train
from tools import shuffled


def test_every_group_keeps_its_rewards_and_loses_their_order():
    """Rows stay what they are as sets; over many rows, place and reward have nothing in common."""
    rewards = torch.arange(8.0).repeat(4000, 1) + 10 * torch.arange(4000)[:, None]
    dealt = shuffled.shuffled(rewards, np.random.RandomState(0))
    assert torch.equal(dealt.sort(1).values, rewards)
    means = (dealt - rewards[:, :1]).mean(0)  # of each place: 3.5, standard error 0.036
    assert (means - 3.5).abs().max() < 0.15
    again = shuffled.shuffled(rewards, np.random.RandomState(0))
    assert torch.equal(again, dealt)


def test_a_run_learns_from_dealt_out_rewards(tmp_path, monkeypatch, capsys):
    """The advantages of a run are those of its own groups' rewards, in another order."""
    seen = []
    real = grpo.advantages
    monkeypatch.setattr(grpo, "advantages", lambda rewards: seen.append(rewards) or real(rewards))
    flags = ["--model", str(TOY), "--params", "13", "--steps", "2", "--prompts", "4", "--group",
             "8", "--eval-count", "4", "--max-new-tokens", "48", "--samples", "32",
             "--reward", "format", "--out"]
    assert shuffled.main([*flags, str(tmp_path / "run")]) == 0
    assert len(seen) == 2
    rows = map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text().splitlines())
    own = torch.tensor([row["scores"]["format"] for row in rows if row.get("rollout")]).view(4, 8)
    assert torch.equal(seen[0].sort(1).values, own.sort(1).values)
    assert not torch.equal(seen[0], own)
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "3"]) == 2  # by real rewards
    one_error(capsys, "was a control")


@pytest.mark.parametrize("words, says", [
    (["--algo", "sft"], "GRPO"), (["--eval-only"], "GRPO"), (["--steps", "-1"], "--steps")])
def test_misuse_ends_in_one_line(words, says, capsys):
    assert shuffled.main(["--model", str(TOY), *words]) == 2
    one_error(capsys, says)
