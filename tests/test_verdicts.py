"""verdicts.py: the rules of the verdict table, on sweeps made up here."""
import json

import pytest

import verdicts
from helpers import ROOT

BASE = {"greedy": 0.1, "T = 1": 0.3}
SIZES = ("TinyLoRA, 1", "TinyLoRA, 4", "TinyLoRA, 13", "TinyLoRA, 28", "TinyLoRA, 112")
F1 = dict.fromkeys(SIZES, (0.6, 0.5)) | {
    "LoRA, r = 1": (0.6, 0.5), "all weights": (0.6, 0.5),
    "control: 13, paid for format": (0.1, 0.3)}


def sweep(settings):
    """A document of settings {name: (greedy, T = 1) or a list of them, one a seed}."""
    runs = {}
    listed = []
    for name, ends in settings.items():
        keys = []
        for end in ends if isinstance(ends, list) else [ends]:
            keys.append(f"{name} {len(keys)}")
            runs[keys[-1]] = {
                "base": {mode: {"strict": x} for mode, x in BASE.items()},
                "final": {mode: {"strict": x, "format": 1.0} for mode, x in zip(BASE, end)}}
        listed.append({"name": name, "runs": keys})
    return {"settings": listed, "runs": runs}


@pytest.mark.parametrize("rule, changed, verdict", [
    ("enough", {}, "holds"),
    ("enough", {"TinyLoRA, 13": (0.56, 0.49)}, "holds"),  # 0.92 and 0.95 of the gains
    ("enough", {"TinyLoRA, 13": (0.54, 0.49)}, "holds sampled, not greedy"),
    ("enough", {"TinyLoRA, 13": [(0.4, 0.4), (0.6, 0.5)]}, "does not hold"),
    ("more", {}, "holds"),
    ("more", {"TinyLoRA, 28": (0.7, 0.5)}, "holds sampled, not greedy"),
    ("more", {"TinyLoRA, 1": (0.7, 0.6)}, "does not hold"),
    ("lora", {}, "holds"),
    ("lora", {"LoRA, r = 1": (0.6, 0.4)}, "holds greedy, not sampled"),
    ("not_format", {}, "holds"),
    ("not_format", {"control: 13, paid for format": (0.2, 0.2)}, "holds sampled, not greedy")])
def test_rules(rule, changed, verdict, monkeypatch):
    monkeypatch.setattr(verdicts, "document", lambda figure: {"F1": sweep(F1 | changed)}[figure])
    assert getattr(verdicts, rule)()[1] == verdict


@pytest.mark.parametrize("ends, verdict", [
    ([(0.1, 0.3), (0.6, 0.5)], "holds"),  # SFT gets there with 10,000 numbers, RL with 13
    ([(0.6, 0.3), (0.7, 0.5)], "holds sampled, not greedy"),  # with 100 numbers, greedy
    ([(0.6, 0.5), (0.7, 0.6)], "does not hold"),
    ([(0.1, 0.3), (0.2, 0.4)], "holds")])  # never
def test_rule_of_sft(ends, verdict, monkeypatch):
    rl = sweep({"TinyLoRA, 13": (0.6, 0.5)})
    sft = sweep({"100, worked": ends[0], "10000, worked": ends[1], "1, own": (1.0, 1.0)})
    for document, numbers in ((rl, [13]), (sft, [100, 10_000, 1])):
        for run, n in zip(document["runs"].values(), numbers):
            run |= {"params": n, "score": "strict"}
    monkeypatch.setattr(verdicts, "document", {"F1": rl, "F2": sft}.get)
    assert verdicts.sft()[1] == verdict


def test_a_weak_seed_decides(monkeypatch):
    for ends, verdict in (([(0.9, 0.6), (0.88, 0.58)], "holds"),
                          ([(0.9, 0.6), (0.6, 0.58)], "holds sampled, not greedy"),
                          ([(0.9, 0.6), (0.6, 0.4)], "does not hold")):
        monkeypatch.setattr(verdicts, "document", lambda figure, e=ends: sweep({"13 numbers": e}))
        measured, said = verdicts.any_seed()
        assert said == verdict
        assert measured.startswith("the weakest of 2 seeds gains")


def test_numbers_are_the_means_of_the_seeds(monkeypatch):
    changed = F1 | {"TinyLoRA, 13": [(0.2, 0.3), (0.4, 0.4)]}
    monkeypatch.setattr(verdicts, "document", lambda figure: sweep(changed))
    assert verdicts.enough()[0].endswith("0.40 greedy, 0.25 at T = 1")  # 0.2 of 0.5, 0.05 of 0.2
    assert "greedy: 0.60, 0.60, 0.30, 0.60, 0.60;" in verdicts.more()[0]


def test_what_is_not_measured_says_so(monkeypatch):
    monkeypatch.setattr(verdicts, "document", lambda figure: None)
    rows = verdicts.table().splitlines()[2:]
    assert len(rows) == len(verdicts.CLAIMS)
    assert all("| not measured yet |" in row for row in rows)
    assert verdicts.lines() == ""


def test_readme_has_what_is_measured(monkeypatch):
    documents = {"F1": sweep(F1 | {"TinyLoRA, 13": (0.6, 0.4)})}
    monkeypatch.setattr(verdicts, "document", documents.get)
    assert verdicts.lines().splitlines() == [
        "- **holds greedy, not sampled**: 13 numbers have most of what RL on all weights gains; "
        "more numbers,", "  more gain.",
        "- **holds**: LoRA of rank 1 gains what all weights gain; the gain is not answer format."]


@pytest.mark.parametrize("greedy, sampled, verdict", [
    ([0.5, 0.6], [0.4, 0.5], "holds"),  # every seed above every seed of all others
    ([0.5, 0.3], [0.4, 0.5], "greedy: cannot be told; T = 1: holds"),  # a seed is among them
    ([0.5, 0.6], [0.1, 0.15], "holds greedy, not sampled"),  # every seed below one of them
    ([0.1, 0.1], [0.1, 0.15], "does not hold"),
    ([0.25, 0.45], [0.3, 0.1], "cannot be told")])
@pytest.mark.parametrize("rule, figure, best", [
    ("rank_two", "F7", "r = 2"), ("bytes_alike", "F4", "fp32"), ("tying", "F4", "tiled"),
    ("u_before_ties", "F8", "4 ties x u 1"), ("off_the_top", "DIRECTIONS", "middle")])
def test_rules_by_ranges(rule, figure, best, greedy, sampled, verdict, monkeypatch):
    """On the committed figure's settings, where `best` is what the claim says is better."""
    definition = json.loads((ROOT / "results" / "figures" / f"{figure}.json").read_text())
    settings = definition["settings"]
    if figure == "F8":
        settings = [s for s in settings if best in (s["name"], s.get("against"))]
    if figure == "DIRECTIONS":
        settings = [s for s in settings if s["name"].startswith(("middle", "top"))]
    others = [(0.2, 0.2), (0.4, 0.3)]
    made = sweep({s["name"]: list(zip(greedy, sampled)) if best in s["name"] else others
                  for s in settings})
    for mine, given in zip(made["settings"], settings):
        mine |= {"against": given["against"]} if "against" in given else {}
    monkeypatch.setattr(verdicts, "document", {figure: made}.get)
    assert getattr(verdicts, rule)()[1] == verdict


@pytest.mark.parametrize("large, verdict", [
    ((0.6, 0.5), "holds"),  # one number is enough
    ((0.1, 0.5), "greedy: cannot be told; T = 1: holds"),  # greedy, both need as many
    ((0.1, 0.3), "cannot be told"),
    ((0.0, 0.2), "does not hold")])
def test_rule_of_sizes(large, verdict, monkeypatch):
    made = sweep({"small, 1": (0.1, 0.3), "small, 10": (0.6, 0.5),
                  "large, 1": large, "large, 10": (0.6, 0.5)})
    for setting in made["settings"]:
        setting["series"] = setting["name"].split(",")[0]
        for key in setting["runs"]:
            made["runs"][key] |= {"params": int(setting["name"].split()[1]), "score": "strict"}
    monkeypatch.setattr(verdicts, "document", {"F3": made}.get)
    measured, said = verdicts.larger_fewer()
    assert said == verdict
    assert measured.startswith("numbers for 0.9 of the gain: greedy: ")
