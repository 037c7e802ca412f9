"""tools/steps_picture.py: reward, length and gap by step, from a sweep's JSON."""
import json

import pytest

from helpers import one_error

from support.errors import InputError
from tools import steps_picture


def document():
    """Two settings of two seeds each; a step without a signal has no gap."""
    steps = {"a": {"reward": [0.1, 0.2], "length": [5.0, 6.0], "gap": [1e-7, None]},
             "b": {"reward": [0.3, 0.6], "length": [7.0, 10.0], "gap": [3e-7, 2e-7]},
             "c": {"length": [4.0, 4.0]}, "d": {"length": [4.0, 4.0]}}
    settings = [{"name": "13", "series": "RL", "runs": ["a", "b"]},
                {"name": "SFT, 13", "series": "SFT", "runs": ["c", "d"]}]
    return {"definition": {"title": "A title"}, "seeds": [0, 1], "settings": settings,
            "runs": {key: {"params": 13, "steps": columns} for key, columns in steps.items()}}


def test_means_and_bands_are_those_of_the_seeds():
    rl, sft = steps_picture.columns(document())
    name, params, panels = rl
    assert (name, params) == ("13", 13)
    reward = [x for point in panels["reward"] for x in point]
    assert reward == pytest.approx([1, 0.2, 0.1, 0.3, 2, 0.4, 0.2, 0.6])
    assert panels["length"] == [(1, 6.0, 5.0, 7.0), (2, 8.0, 6.0, 10.0)]
    assert panels["gap"][1] == (2, 2e-7, 2e-7, 2e-7)  # of the seed that has one
    assert sft[2]["reward"] == [] and len(sft[2]["length"]) == 2
    assert [line[0] for line in steps_picture.columns(document(), "RL")] == ["13"]


def test_a_picture_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "F1.runs.json"
    path.write_text(json.dumps(document()))
    assert steps_picture.main([str(path)]) == 0
    assert (tmp_path / "F1.steps.png").read_bytes().startswith(b"\x89PNG")
    assert "2 settings" in capsys.readouterr().out


def test_misuse_ends_in_one_line(tmp_path, capsys):
    path = tmp_path / "F1.runs.json"
    path.write_text(json.dumps(document()))
    assert steps_picture.main([str(path), "--series", "other"]) == 2
    one_error(capsys, "the series are 'RL', 'SFT'")
    assert steps_picture.main([str(tmp_path / "none.runs.json")]) == 2
    one_error(capsys, "none.runs.json")
    old = document()
    del old["runs"]["b"]["steps"]
    with pytest.raises(InputError, match="kept without their steps"):
        steps_picture.columns(old)
