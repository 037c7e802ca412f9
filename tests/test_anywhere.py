"""tools/anywhere.py: where the right number stands."""
import json

from helpers import one_error

from tools import anywhere


def write(folder, responses, modes=(False, True), answer="1 + 6 = 7\n#### 7", prompt="1 + 6?"):
    folder.mkdir()
    rows = [{"step": step, "sampled": sampled, "answer": answer, "response": response,
             "prompt": prompt,
             "scores": {"strict": 0.0, "lenient": float(response.endswith("7"))}}
            for step in (0, 5) for sampled in modes
            for response in (responses if step else ["no number"])]
    rows.append(rows[-1] | {"rollout": True, "response": "7"})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_shares(tmp_path, capsys):
    """The last evaluation's rows alone, no rollouts; "#### 3" hides no 7, "10-7" ends in 7."""
    before = write(tmp_path / "before", ["7 and 8 #### 3", "17", "", "10-7", "8 or 7"])
    after = write(tmp_path / "after", ["7", "7.0 it is"])
    assert anywhere.main([after, before]) == 0
    greedy, sampled = map(json.loads, capsys.readouterr().out.splitlines())
    assert greedy["mode"] == "greedy" and sampled["mode"] == "T = 1"
    assert greedy["before"] == sampled["before"] == {
        "n": 5, "lenient": 0.6, "anywhere": 0.6, "last": 0.4, "numbers": 1.6}
    assert greedy["after"] == {
        "n": 2, "lenient": 0.5, "anywhere": 1.0, "last": 1.0, "numbers": 1.0}


def test_what_it_cannot_read_is_refused(tmp_path, capsys):
    good = write(tmp_path / "good", ["7"])
    greedy = write(tmp_path / "greedy", ["7"], modes=(False,))
    other = write(tmp_path / "other", ["7"], prompt="2 + 5?")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "samples.jsonl").write_text("")
    for folder, message in ((greedy, "nothing T = 1"), (str(tmp_path / "none"), "no evaluation"),
                            (str(tmp_path / "nowhere"), "no such file"),
                            (other, "not of the same problems")):
        assert anywhere.main([good, folder]) == 2
        one_error(capsys, message)
