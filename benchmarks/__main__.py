"""``python -m benchmarks``: :mod:`benchmarks.read_path`, and after it each of the others, about a quarter of an hour in all;
with ``--json`` the first alone."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import read_path

code = read_path.main()
if "--json" not in sys.argv:
    print()
    sys.stdout.flush()
    # each in a process of its own: of the first the memory can be measured, and the second has nobody else's listeners
    for module in ("memory_bound", "workload", "session_index", "denormalize"):
        code = subprocess.call([sys.executable, "-m", f"benchmarks.{module}"]) or code
        print()
        sys.stdout.flush()
sys.exit(code)
