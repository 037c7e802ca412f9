"""The data sets that --data and --eval-data know by name, each file fetched once.

An address names a commit and a sha256 the bytes, so the problems are the same everywhere, always.
Test sets are for --eval-data, or for --eval-only: nothing can be trained on them.
"""
import json
from pathlib import Path

from support.data import download, split_paths
from support.errors import InputError
from support.files import LARGEST_DATA, parse_json, read_text, replacing

GITHUB = "https://raw.githubusercontent.com/"
GSM8K = ("openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
         "grade_school_math/data/")
# SimpleRL's own files. Of its 8,523 problems, levels 3 to 5 of MATH, none is in MATH500; two have
# no answer and are left out (gsm8k.read_problems).
SIMPLERL = "hkust-nlp/simpleRL-reason/2702a87c68c107d0f329b701b034c229bf62a130/"

# What a file is called in the cache: where it is, and its sha256.
FILES = {
    "gsm8k/train.jsonl": (
        GSM8K + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "gsm8k/test.jsonl": (
        GSM8K + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    "math/train.json": (
        SIMPLERL + "train/data/math_level3to5_data_processed_with_qwen_prompt.json",
        "e3663dfbf2f42ae201e2b14a1c2dce9e4ffa8f8776fc17ff02e0f440b60da257"),
    "math500/test.jsonl": (
        SIMPLERL + "eval/data/math500/test.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    "amc23/test.jsonl": (
        SIMPLERL + "eval/data/amc23/test.jsonl",
        "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4"),
    "aime24/test.jsonl": (
        SIMPLERL + "eval/data/aime24/test.jsonl",
        "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac"),
    "olympiad/test.json": (
        SIMPLERL + "eval/data/olympiadbench/test.json",
        "3567c23130004c8936543aeb06739f094fcdcb1688cb2b655d0b18e7e1e3d4f9")}
SETS = {"gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
        "math": ("math/train.json", "math500/test.jsonl"),
        "math500": (None, "math500/test.jsonl"),
        "amc23": (None, "amc23/test.jsonl"),
        "aime24": (None, "aime24/test.jsonl"),
        "olympiad": (None, "olympiad/test.json")}


def find_data(data, eval_only=False):
    """--data -> (path of the training file or None, path of the test file).

    A set's name, a folder with train.jsonl and test.jsonl, or one file to evaluate on.
    """
    if data not in SETS:
        if not Path(data).exists():
            raise InputError(f"--data {data}: no such file or folder, and no set of this name; "
                             f"there are {', '.join(SETS)}")
        return split_paths(data, eval_only)
    train, test = SETS[data]
    if train is None and not eval_only:
        raise InputError(f"--data {data}: is a test set, without problems to train on; give it "
                         f"to --eval-data")
    return None if eval_only else fetch(train), fetch(test)


def fetch(name):
    """The path of a file of JSON lines."""
    address, sha256 = FILES[name]
    path = download(GITHUB + address, name, sha256)
    return path if path.suffix == ".jsonl" else as_lines(path)


def as_lines(path):
    """SimpleRL's or OlympiadBench's list as JSON lines, beside it, as MATH500 has them."""
    lines = ""
    for row in parse_json(read_text(path, LARGEST_DATA)):
        answer = row["gt_answer"] if "gt_answer" in row else row["final_answer"][0]
        lines += json.dumps({"problem": row["question"], "answer": answer}) + "\n"
    made = path.with_suffix(".jsonl")
    if not made.is_file() or made.read_text(encoding="utf-8") != lines:
        with replacing(made) as temporary:
            temporary.write_text(lines, encoding="utf-8")
    return made
