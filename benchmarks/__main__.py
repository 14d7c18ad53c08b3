"""``python -m benchmarks``: see :mod:`benchmarks.read_path` and :mod:`benchmarks.memory_bound`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import read_path

code = read_path.main()
if "--json" not in sys.argv:
    print()
    sys.stdout.flush()
    # in a process of its own, of which the memory can be measured
    code = subprocess.call([sys.executable, "-m", "benchmarks.memory_bound"]) or code
sys.exit(code)
