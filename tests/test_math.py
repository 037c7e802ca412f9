"""--data math and --eval-data: the sets that have names, several sets at once, their mean.

Docstrings name the bug. Addresses are those of support/datasets.py, on a server on loopback.
"""
import hashlib
import http.server
import json
import shutil
import threading

import pytest

from helpers import ASSETS, ROOT, TINY_RUN, TOY, needs_assets, one_error, read_rows

import gsm8k
import train
from support import datasets, scores
from support.data import set_names
from support.errors import InputError
from support.files import read_json
from tools import card, compare
from tools.runs import read_run

NAMES = ["strict", "lenient", "format"]
TESTS = {"math500": 500, "amc23": 40, "aime24": 30}


# ---- what the names stand for

@pytest.fixture
def sources(server, tmp_path, monkeypatch):
    """An empty cache, and a server whose files are put where the addresses say: a function."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "GITHUB", server)

    def put(name, data, pinned=True):
        address, sha256 = datasets.FILES[name]
        path = tmp_path / "www" / address
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if not pinned:
            sha256 = hashlib.sha256(data).hexdigest()
        monkeypatch.setitem(datasets.FILES, name, (address, sha256))
    return put


def simplerl(*rows):
    """A list as SimpleRL's file has it: the answer under four names, the prompt ready-made."""
    return json.dumps([{"input": f"<|im_start|>user\n{question}<|im_end|>", "answer": f"{gold} ",
                        "gt_answer": gold, "subject": "Algebra", "level": 5, "question": question,
                        "ground_truth_answer": gold, "target": gold} for question, gold in rows],
                      indent=4).encode()


def test_an_address_names_a_commit():
    """A branch, whose files change."""
    for address, sha256 in datasets.FILES.values():
        commit = address.split("/")[2]
        assert len(commit) == 40 and not commit.strip("0123456789abcdef") and len(sha256) == 64
    names = [name for pair in datasets.SETS.values() for name in pair if name]
    assert set(names) == set(datasets.FILES)


def test_math_trains_on_simplerls_list(sources, tmp_path, monkeypatch):
    """The ready-made prompt or an untrimmed answer taken; "####" asked for; the cache written anew
    every time, or believed when it is damaged; the training file fetched to evaluate."""
    sources("math/train.json", simplerl(("What is $1/2$?", "\\frac{1}{2}"), ("é?", "3")), False)
    sources("math500/test.jsonl", b'{"problem": "2?", "answer": "2"}\n', False)
    train_problems, test_problems = gsm8k.load("math")
    assert [(p["question"], p["answer"]) for p in train_problems] == [
        ("What is $1/2$?", "\\frac{1}{2}"), ("é?", "3")]
    assert "\\boxed{}" in gsm8k.prompt(train_problems[0])
    assert gsm8k.score("so \\boxed{0.5}", train_problems[0])["strict"] == 1
    assert [p["question"] for p in test_problems] == ["2?"]
    monkeypatch.setattr(datasets, "GITHUB", "http://127.0.0.1:9/")  # nobody listens there
    made = tmp_path / "cache" / "math" / "train.jsonl"
    before = made.stat().st_mtime_ns
    assert gsm8k.load("math") == (train_problems, test_problems)
    assert made.stat().st_mtime_ns == before
    made.write_text('{"problem": "another", "answer": "4"}\n')
    assert gsm8k.load("math") == (train_problems, test_problems)
    (tmp_path / "cache" / "math" / "train.json").unlink()
    assert gsm8k.load("math", eval_only=True) == ([], test_problems)
    with pytest.raises(InputError, match="cannot be downloaded"):
        gsm8k.load("math")


def test_olympiads_answers_are_lists_of_one(sources):
    """The list taken for the answer; several roots in it must be wanted, in any order."""
    row = {"question": "Roots?", "final_answer": ["$-2,0,2$"], "is_multiple_answer": True}
    sources("olympiad/test.json", json.dumps([row]).encode(), False)
    _, (problem,) = gsm8k.load("olympiad", eval_only=True)
    assert problem["answer"] == "$-2,0,2$" and "\\boxed{}" in gsm8k.prompt(problem)
    answers = {"0, 2, -2": 1, "-2,0,2": 1, "0,2": 0, "2": 0}
    assert {x: gsm8k.score(f"\\boxed{{{x}}}", problem)["strict"] for x in answers} == answers


@needs_assets
def test_the_test_sets_are_the_pinned_ones(sources):
    """A sum that no file has. Every gold answer in a box is right, and asked for in a box."""
    for name, count in TESTS.items():
        sources(f"{name}/test.jsonl", (ASSETS / "math" / f"{name}.jsonl").read_bytes())
        train_problems, problems = gsm8k.load(name, eval_only=True)
        assert train_problems == [] and len(problems) == count
        for problem in problems:
            assert gsm8k.prompt(problem).endswith(gsm8k.BOXED_INSTRUCTION)
            right = gsm8k.score(f"\\boxed{{{problem['answer']}}}", problem)
            assert list(right.values()) == [1, 1, 1]
            wrong = gsm8k.score(f"\\boxed{{{problem['answer']}7}}", problem)
            assert list(wrong.values()) == [0, 0, 1]


@needs_assets
def test_answers_of_contests_are_numbers_however_they_are_written():
    """AMC's 27.0 is a float in its file, AIME's 025 has a zero in front."""
    for name in ("amc23", "aime24"):
        for problem in gsm8k.read_problems(ASSETS / "math" / f"{name}.jsonl"):
            number = int(float(problem["answer"]))
            for text in (number, f"{number:,}", f"{number}.0", f"x = {number}", f"${number}$"):
                assert gsm8k.score(f"\\boxed{{{text}}}", problem)["strict"] == 1, text
            assert gsm8k.score(f"It is {number}.", problem) == {
                "strict": 0, "lenient": 1, "format": 0}
            for other in (number + 1, -number - 1, f"{number}.5", f"0.{number}"):
                assert gsm8k.score(f"\\boxed{{{other}}}", problem)["strict"] == 0


@pytest.mark.parametrize("data,words", [
    ("amc23", ["--data amc23", "test set", "--eval-data"]),
    ("Math", ["--data Math", "gsm8k, math, math500, amc23, aime24, olympiad"])])
def test_what_cannot_be_trained_on(data, words, tmp_path, capsys):
    assert train.main([*TINY_RUN, "--data", data, "--out", str(tmp_path / "run")]) == 2
    one_error(capsys, *words)


class Short(http.server.BaseHTTPRequestHandler):
    """Half of a file, the connection closed as if it were the whole."""
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"problem": "1?", "answer": "1"}\n')

    def log_message(self, *args):
        pass


def test_half_a_set_is_not_kept(tmp_path, monkeypatch, capsys):
    """Half of AIME evaluated as if it were AIME."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Short) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setattr(datasets, "GITHUB", f"http://127.0.0.1:{httpd.server_port}/")
        flags = ["--eval-only", "--eval-data", "aime24", "--out", str(tmp_path / "run")]
        assert train.main(flags) == 2
        httpd.shutdown()
    one_error(capsys, "aime24", "sha256", "nothing was kept")
    assert not list((tmp_path / "cache").rglob("*.jsonl*"))


# ---- several sets: means, lines

def test_a_set_counts_once_however_large_it_is():
    """The mean over all problems, in which 30 of AIME vanish beside 500 of MATH."""
    problems = [{"eval_set": "large"}] * 3 + [{"eval_set": "small"}]
    columns = {"length": [1, 2, 3, 10], "strict": [1.0, 0.0, 0.0, 1.0]}
    result = scores.averages(problems, columns)
    assert result == {"length": 4, "strict": (1 / 3 + 1) / 2, "sets": {
        "large": {"eval_count": 3, "length": 2, "strict": 1 / 3},
        "small": {"eval_count": 1, "length": 10, "strict": 1.0}}}
    assert scores.averages([{}] * 4, columns) == {"length": 4, "strict": 0.5}
    # two shares whose errors are 0.1 and 0.05: half the root of 0.0125
    assert scores.error_of_mean([(0.5, 25), (0.5, 100)]) == pytest.approx(0.0125**0.5 / 2)


def test_the_lines_of_an_evaluation(capsys):
    """A line that does not say which set; the mean's error as if it were one large set's."""
    sets = {"a": {"eval_count": 100, "strict": 0.5, "length": 20.4},
            "b": {"eval_count": 25, "strict": 0.5, "length": 9.0}}
    result = {"strict": 0.5, "length": 18.1, "sets": sets}
    scores.print_evaluation("evaluation, greedy", result, 125, 2.04, ["strict"])
    only = {"strict": 0.5, "length": 20.4, "sets": {"a": sets["a"]}}
    scores.print_evaluation("evaluation, greedy", only, 100, 2.04, ["strict"])
    scores.print_table([result, result], [result, result], 125, ["strict"])
    assert capsys.readouterr().out.splitlines() == [
        "evaluation, greedy, a: strict 0.500 +- 0.050  (100 problems, 20 tokens each)",
        "evaluation, greedy, b: strict 0.500 +- 0.100  (25 problems, 9 tokens each)",
        "evaluation, greedy, mean of 2 sets: strict 0.500 +- 0.056  "
        "(125 problems, 18 tokens each, 2.0 s)",
        "evaluation, greedy, a: strict 0.500 +- 0.050  (100 problems, 20 tokens each, 2.0 s)",
        "",
        "125 held-out problems, 2 sets    before            after",
        "mean, greedy, strict           0.500 +- 0.056    0.500 +- 0.056",
        "mean, T = 1, strict            0.500 +- 0.056    0.500 +- 0.056",
        "a, greedy, strict              0.500 +- 0.050    0.500 +- 0.050",
        "b, greedy, strict              0.500 +- 0.100    0.500 +- 0.100"]


BAD_NAMES = {"": "empty name", "a,": "empty name", "a,,b": "empty name", "a, b ,a": "a twice"}


@pytest.mark.parametrize("text", BAD_NAMES, ids=repr)
def test_names_that_are_missing_or_said_twice(text):
    with pytest.raises(InputError, match=BAD_NAMES[text]):
        set_names(text)


# ---- several sets: a run

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two sets made of the toy's test problems: 20 and 10."""
    folder = tmp_path_factory.mktemp("sets")
    lines = (TOY / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "b.jsonl").write_text("".join(lines[20:30]))
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl")]


FLAGS = [*TINY_RUN[:-2], "--eval-count", "12", "--samples", "100", "--eval-every", "1"]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """Two steps on the toy's problems, evaluated on both sets, the first cut to 12 problems."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*FLAGS, "--eval-data", ",".join(files), "--out", str(out)]) == 0
    return out


def test_each_set_scores_what_it_scores_alone(run, files, tmp_path):
    """Problems counted for the wrong set; --eval-count a limit for all sets together; training
    problems read, or asked for, when nothing is trained."""
    summary = read_json(run / "summary.json")
    assert summary["eval_count"] == 22 and list(summary["sets"]) == files
    for file, count in zip(files, (12, 10)):
        flags = ["--eval-only", "--eval-data", file, "--data", "nowhere", "--eval-count", "12",
                 "--max-new-tokens", "24", "--adapter", str(run / "adapter.safetensors")]
        out = tmp_path / file.split("/")[-1]
        assert train.main([*flags, "--out", str(out)]) == 0
        alone = read_json(out / "summary.json")
        of_set = summary["sets"][file]
        assert of_set["eval_count"] == count == alone["eval_count"] and alone["data"] == file
        assert [of_set[f"final_{name}"] for name in NAMES] == [alone[name] for name in NAMES]
        assert list(alone["sets"]) == [file]
    for name in ("base_strict", "final_strict", "final_sampled", "final_sampled_lenient"):
        a, b = (one[name] for one in summary["sets"].values())
        assert summary[name] == pytest.approx((a + b) / 2)
    assert summary["base_lenient"] > 0  # or all of this is 0 = 0


def test_samples_and_log_tell_the_sets(run, files, tmp_path):
    """--samples spent on the first set; a plot with a panel for "sets"."""
    rows = [row for row in read_rows(run / "samples.jsonl") if "rollout" not in row]
    assert [row["set"] for row in rows[:22]] == [files[0]] * 12 + [files[1]] * 10
    assert len(rows) == 5 * 22  # before and after, greedy and not; after step 1
    first = read_rows(run / "log.jsonl")[0]
    assert list(first["eval_sets"]) == files
    assert first["eval_strict"] == pytest.approx(
        sum(one["strict"] for one in first["eval_sets"].values()) / 2)
    assert set(read_run(run).scores) == set(NAMES)
    few = ["--eval-only", "--eval-data", ",".join(files), "--samples", "3", "--max-new-tokens", "4"]
    assert train.main([*few, "--out", str(tmp_path / "few")]) == 0
    sets = [row["set"] for row in read_rows(tmp_path / "few" / "samples.jsonl")]
    assert sets == ([files[0]] * 3 + [files[1]] * 3) * 2


def test_compare_pairs_within_a_set(run, files, monkeypatch, capsys):
    """Two sets that share a problem, which then counts once."""
    monkeypatch.setattr("sys.argv", ["compare", str(run)])
    compare.work(compare.parse())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["mode"], x.get("set"), x["n"]) for x in lines] == [
        (mode, name, n) for mode in scores.MODES
        for name, n in zip([*files, None], (12, 10, 22))]
    before = compare.evaluations(run)[0, False]
    assert {name for name, _ in before} == set(files)


def test_resume_goes_on_with_the_sets(run, files, tmp_path, capsys):
    """A set that changed, or the flag forgotten: the run must end as one that never stopped."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "summary.json").unlink()
    (out / "state-0.safetensors").unlink()  # the last: back to the one after step 1
    assert train.main(["--resume", str(out)]) == 0
    again = read_json(out / "summary.json")
    assert again | {"seconds": 0} == read_json(run / "summary.json") | {"seconds": 0}
    assert read_rows(out / "samples.jsonl") == read_rows(run / "samples.jsonl")
    capsys.readouterr()
    (out / "summary.json").unlink()
    config = read_json(out / "config.json")
    (out / "config.json").write_text(json.dumps(config | {"eval_data": files[1]}))
    assert train.main(["--resume", str(out)]) == 2
    one_error(capsys, f"or {files[1]} changed")
    assert train.main(["--resume", str(out), "--eval-data", files[0]]) == 2
    one_error(capsys, "leave out --eval-data")


def test_the_end_of_a_run_names_its_sets(run, files, tmp_path, capsys):
    """The command that evaluates again, on another set."""
    flags = [*TINY_RUN, "--steps", "0", "--eval-data", "toy," + files[1]]
    assert train.main([*flags, "--data", str(TOY), "--out", str(tmp_path / "run")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"--eval-data toy,{files[1]} " in last and f"--data {TOY} " in last


def test_a_model_card_has_a_row_for_each_set(run, files):
    """The mean of sets shown with the error of one large set, under the training data's name."""
    lines = card.scores_table(run / "summary.json")
    assert lines[0] == f"22 held-out problems of `{', '.join(files)}`:"
    assert [line.split(" | ")[0] for line in lines if "strict, greedy" in line] == [
        f"| {files[0]} (12), strict, greedy", f"| {files[1]} (10), strict, greedy"]


@pytest.mark.parametrize("name,words", [
    ("aime25", ["--eval-data aime25", "gsm8k, math, math500, amc23, aime24"]),
    ("a,a", ["a twice"]), (",", ["empty name"]), ("/dev/null", ["/dev/null"])])
def test_wrong_names_are_one_line(name, words, tmp_path, capsys):
    flags = ["--eval-only", "--eval-data", name, "--out", str(tmp_path / "run")]
    assert train.main(flags) == 2
    one_error(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_a_model_folder_names_no_sets(tmp_path, capsys):
    """tinylora.json could have files of this machine read, and written into samples.jsonl."""
    shutil.copytree(TOY, tmp_path / "model")
    (tmp_path / "model" / "tinylora.json").write_text('{"eval_data": "/etc/passwd"}')
    assert train.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 2
    one_error(capsys, "'eval_data' is not a flag that a model folder may set")


def test_a_task_of_ones_own_has_its_own_sets(tmp_path, capsys):
    """--eval-data says to load what --data would; the error names the flag that was given."""
    flags = ["--task", str(ROOT / "examples" / "arithmetic.py"), "--eval-only", "--eval-count", "2",
             "--max-new-tokens", "4"]
    names = "validation, test"
    assert train.main([*flags, "--eval-data", names, "--out", str(tmp_path / "a")]) == 0
    assert list(read_json(tmp_path / "a" / "summary.json")["sets"]) == ["validation", "test"]
    capsys.readouterr()
    assert train.main([*flags, "--eval-data", "amc23", "--out", str(tmp_path / "b")]) == 2
    one_error(capsys, "--eval-data amc23: this task has train, validation")
