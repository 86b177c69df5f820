"""`python -m benchmarks NAME` runs benchmarks/bench_NAME.py; without a name it lists them. Only peers takes options."""

import importlib
import sys
from pathlib import Path

names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
name = sys.argv.pop(1) if len(sys.argv) > 1 else None
if name not in names or (sys.argv[1:] and name != "peers"):
    sys.exit(f"python -m benchmarks NAME, with NAME one of: {', '.join(names)}")
importlib.import_module(f"benchmarks.bench_{name}").main()
