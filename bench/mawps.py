"""One-step word problems for models too small for GSM8K: python bench/mawps.py MAWPS.jsonl OUT

MAWPS.jsonl is the copy in github.com/QwenLM/Qwen2.5-Math (input, target, type). OUT becomes a
--data folder of its 562 single-op problems: the first 48 are test.jsonl, the rest train.jsonl.
"""
import json
import sys
from pathlib import Path

TEST = 48


def main(source, out):
    lines = []
    for line in Path(source).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["type"] == "singleop":
            problem = {"question": row["input"], "answer": f"{row['target']:g}"}
            lines.append(json.dumps(problem) + "\n")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "test.jsonl").write_text("".join(lines[:TEST]), encoding="utf-8")
    (out / "train.jsonl").write_text("".join(lines[TEST:]), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
