"""`python -m benchmarks NAME` runs benchmarks/bench_NAME.py; without a name it lists them."""

import importlib
import sys
from pathlib import Path

names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
if len(sys.argv) != 2 or sys.argv[1] not in names:
    sys.exit(f"python -m benchmarks NAME, with NAME one of: {', '.join(names)}")
importlib.import_module(f"benchmarks.bench_{sys.argv[1]}").main()
