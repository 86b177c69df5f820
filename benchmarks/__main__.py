"""`python -m benchmarks NAME` runs benchmarks/bench_NAME.py; without a name it lists them. Only peers takes options.

`python -m benchmarks figures` measures nothing, and draws the results.
"""

import importlib
import sys
from pathlib import Path

modules = {path.stem.removeprefix("bench_"): path.stem for path in sorted(Path(__file__).parent.glob("bench_*.py"))}
modules["figures"] = "figures"
name = sys.argv.pop(1) if len(sys.argv) > 1 else None
if name not in modules or (sys.argv[1:] and name != "peers"):
    sys.exit(f"python -m benchmarks NAME, with NAME one of: {', '.join(modules)}")
importlib.import_module(f"benchmarks.{modules[name]}").main()
