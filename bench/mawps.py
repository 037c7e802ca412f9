"""One-step word problems for models too small for GSM8K: python bench/mawps.py MAWPS.jsonl OUT

MAWPS.jsonl is Qwen2.5-Math's copy (input, target, type). OUT becomes a --data folder of its 562 single-op problems: the first 48
are test.jsonl, the rest train.jsonl.
"""
import json
import sys
from pathlib import Path


def main(source, out):
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    rows = [json.dumps({"question": r["input"], "answer": f"{r['target']:g}"}) + "\n" for r in rows if r["type"] == "singleop"]
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "test.jsonl").write_text("".join(rows[:48]), encoding="utf-8")
    (Path(out) / "train.jsonl").write_text("".join(rows[48:]), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
