"""python results/sweep.py F7 --seeds 3; all about it, --first-seed, --out and --report: --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.sweep import main

if __name__ == "__main__":
    sys.exit(main())
