"""README.md and docs/ say what the code does and what the committed runs gave.

    python tests/test_docs.py       # writes what is derived anew: tables of results, lists of flags

Between two comments `<!-- made by tests/test_docs.py: NAME -->` and `<!-- end -->` stands what
GENERATED makes. The tests compare; the command above replaces, after a run or a flag has changed.
"""
import json
import os
import re
import shlex
import subprocess
import sys
from statistics import median

import pytest

from helpers import ROOT, tiny, write_folder
from tables import GENERATED

import train
from support import flags
from support.errors import InputError
from tools.runs import IGNORED

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- made by tests/test_docs\.py: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


# ---- what is derived from results/ and from the flags (tables.py)

def refreshed(text):
    return BLOCK.sub(lambda m: m[1] + GENERATED[m[2]]() + "\n" + m[4], text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_what_runs_and_flags_say(path):
    """A run made anew, or a flag that changed, must not leave an old figure behind. If this fails:
    python tests/test_docs.py"""
    text = path.read_text(encoding="utf-8")
    assert text == refreshed(text)


def test_every_derived_block_is_used():
    used = [m[2] for path in DOCUMENTS for m in BLOCK.finditer(path.read_text(encoding="utf-8"))]
    assert sorted(used) == sorted(GENERATED)


# ---- README's shape

def test_readme_is_short_and_begins_with_the_result():
    text = README.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 150 and len(text.split()) <= 2200
    screen = "\n".join(lines[:30])
    assert "](results/toy.png)" in screen
    commands = [line for line in lines if line.startswith("pip install")]  # .ci/run runs these two
    assert commands == [
        "pip install -r requirements.txt && python train.py --params 13",
        "pip install -r requirements-dev.txt && python -m pytest -q -n 2 --dist loadfile"]
    assert all(f"```bash\n{command}\n```" in screen for command in commands)


def test_no_line_is_wide_but_tables_and_links():
    for path in DOCUMENTS:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert len(line) <= 100 or line.startswith(("| ", "<!--")), f"{path.name}: {line}"


# ---- what the documents name is there

def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(path):
    text = without_code(path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
    # a file that is written in code style: from the project's folder, or a name that is in it
    for word in re.findall(r"`([\w./*-]+\.(?:py|md|png|txt)|\w+/[\w./*-]*)`", without_code(text)):
        if not word.startswith(("runs/", "letters")):
            assert any(ROOT.glob(word.rstrip("/"))), f"{path.name}: {word}"


def test_every_document_is_linked_from_the_readme():
    text = README.read_text(encoding="utf-8")
    assert all(f"](docs/{path.name})" in text for path in DOCUMENTS[1:])


# ---- the commands

def commands(path):
    """The python and torchrun commands of a document: in bash blocks, and `in the text`."""
    text = path.read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", without_code(text))
    for line in lines:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and words[0] in ("python", "torchrun"):
                yield words


def check_train(words):
    """Words after train.py; a capital letter stands for a value that the reader puts in."""
    words = ["1" if re.fullmatch("[A-Z]", word) else word for word in words if word != "--help"]
    given = vars(flags.parser(train.__doc__, train.RECIPE).parse_args(words))
    flags.check_given({name.replace("_", "-"): value for name, value in given.items()})


def check_other(path, words):
    source = path.read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            assert f"--{name}" in source or f'"{name}"' in source, f"{path}: {word}"


ALL_COMMANDS = sorted({shlex.join(words) for path in DOCUMENTS for words in commands(path)})


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    assert all(any(ROOT.glob(word)) for word in words if word.startswith("results/"))
    if "train.py" in words:
        check_train(words[words.index("train.py") + 1:])
    elif words[:2] == ["python", "-m"]:
        if words[2] == "tools.shuffled":  # takes train.py's flags
            check_train([word for word in words[3:] if word != "..."])
        elif "--" in words:  # after it, too
            check_train(words[words.index("--") + 1:])
        elif words[2] != "pytest":
            check_other(ROOT / (words[2].replace(".", "/") + ".py"), words[3:])
    else:
        check_other(ROOT / words[1], words[2:])


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if c.startswith("python bench/")])
def test_the_benchmarks_models_are_to_be_had(command):
    """Two commands named a model that was neither a folder nor a name on the hub."""
    words = shlex.split(command)
    given = [words[i + 1] for i, word in enumerate(words) if word == "--model"]
    if not given:
        configs = [ROOT / word / "config.json" for word in words if word.startswith("results/")]
        given = [json.loads(path.read_text())["model"] for path in configs]
    for name in given:
        on_the_hub = re.fullmatch(r"[\w-]+/[\w.-]+", name)
        assert on_the_hub or (ROOT / name / "config.json").is_file(), name


@pytest.mark.parametrize("flag, pattern", [("--task", "arithmetic-seed*"), ("13", "toy-seed*")])
def test_a_readme_command_is_the_one_of_the_committed_runs(flag, pattern, tmp_path):
    """The README's had a group of 4, by default, beside what runs with 8 had given."""
    words = next(words for words in commands(README) if words[1] == "train.py" and flag in words)
    write_folder(tmp_path, tiny())  # stands for the model that is on the hub
    words = [str(tmp_path) if word.startswith("HuggingFaceTB/") else word for word in words[2:]]
    said = vars(train.flags(words))
    paths = list(ROOT.glob(f"results/{pattern}/config.json"))
    assert len(paths) >= 2
    for path in paths:
        ran = json.loads(path.read_text())
        for name in ran.keys() & said.keys() - IGNORED - {"model", "dtype"}:
            assert said[name] in (None, ran[name]), f"{path}: {name}"  # None: decided later


def test_the_gap_in_the_readme_is_that_of_the_logs():
    """`gap` is how far the sampler's log-probs are from the trainer's: the median of the steps."""
    gaps = []
    for pattern in ("toy-seed*", "arithmetic-seed*"):
        rows = [json.loads(line) for path in ROOT.glob(f"results/{pattern}/log.jsonl")
                for line in path.read_text().splitlines()]
        gaps.append(median(row["gap"] for row in rows if row["gap"] is not None))
    text = " ".join(README.read_text(encoding="utf-8").split())
    said = re.search(r"`gap` .*?: (\S+) on the toy, (\S+) on SmolLM2", text)
    assert [float(f"{gap:.0e}") for gap in gaps] == [float(word) for word in said.groups()]


def test_a_wrong_command_is_noticed():
    for words in (["--parms", "13"], ["--lr", "fast"], ["--algo", "sft", "--kl", "0.1"]):
        with pytest.raises(InputError):
            check_train(words)


def test_flags_in_the_text_exist():
    names = {name for name, *_ in (*train.RECIPE, *flags.PROGRAM)}
    names |= {"help", "to", "claim"}  # the last two are tools.export's and tools.plot's
    for path in DOCUMENTS:
        text = without_code(path.read_text(encoding="utf-8"))
        for span in re.findall(r"`([^`\n]*)`", text):
            if not span.startswith("python") or " train.py" in span:
                unknown = set(re.findall(r"(?<!\S)--([a-z][\w-]*)", span)) - names
                assert not unknown, f"{path.name}: {span}"


# ---- the programs

def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_library_example_runs(tmp_path):
    """README's example as it stands, in an empty folder; what it saved is what it trained."""
    code, = python_blocks(README)
    assert len(code.splitlines()) <= 24 and max(map(len, code.splitlines())) <= 100
    check = ("\nassert v.shape == (13, 1) and v.abs().max() > 0"
             "\nassert torch.equal(tinylora.load('adapter.safetensors', again), v)\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, text=True,
                            capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_the_task_example_trains(tmp_path, capsys):
    """docs/your-own-task.md's file as it stands: two steps on the toy, rewarded by its first score,
    and by another; step lines and the summary carry the names that the file invents."""
    code, = python_blocks(ROOT / "docs" / "your-own-task.md")
    assert len(code.splitlines()) <= 40
    path = tmp_path / "letters.py"
    path.write_text(code, encoding="utf-8")
    small = "--params 13 --steps 2 --prompts 4 --group 4 --max-new-tokens 12 --eval-count 6"
    for reward, extra in (("sorted", []), ("share", ["--reward", "share"])):
        out = tmp_path / reward
        words = [*small.split(), "--task", str(path), "--out", str(out), *extra]
        assert train.main(words) == 0
        printed = capsys.readouterr().out
        assert "step   2/2  sorted 0." in printed and "  share 0." in printed
        summary = json.loads((out / "summary.json").read_text())
        assert summary["reward"] == reward and summary["eval_count"] == 6
        assert {"base_sorted", "final_sorted", "base_share", "final_share"} <= set(summary)


def test_the_task_example_scores_what_it_says():
    code, = python_blocks(ROOT / "docs" / "your-own-task.md")
    task = {}
    exec(code, task)
    train_problems, test_problems = task["load"]("anything", False)
    words = [problem["word"] for problem in train_problems + test_problems]
    assert len(set(words)) == len(words) and len(test_problems) == 200
    problem = {"word": "hedgea", "answer": "a d e e g h"}
    assert task["score"]("a d e e g h", problem) == {"sorted": 1.0, "share": 1.0}
    assert task["score"]("Sure:\nA D E E G H.", problem)["sorted"] == 1.0
    assert task["score"]("h g e e d a", problem)["sorted"] == 0.0
    assert 0 < task["score"]("a d e g h", problem)["share"] < 1
    assert task["score"]("", problem) == {"sorted": 0.0, "share": 0.0}
    assert task["prompt"](problem, " Shout.").endswith("hedgea in alphabetical order. Shout.")


if __name__ == "__main__":
    texts = {document: refreshed(document.read_text(encoding="utf-8")) for document in DOCUMENTS}
    for document, text in texts.items():  # written when all could be made
        document.write_text(text, encoding="utf-8")
