"""``python -m benchmarks``: see :mod:`benchmarks.read_path`, :mod:`benchmarks.memory_bound` and
:mod:`benchmarks.denormalize`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import read_path

code = read_path.main()
if "--json" not in sys.argv:
    print()
    sys.stdout.flush()
    # each in a process of its own: of the first the memory can be measured, and the second has nobody else's listeners
    for module in ("benchmarks.memory_bound", "benchmarks.denormalize"):
        code = subprocess.call([sys.executable, "-m", module]) or code
        print()
        sys.stdout.flush()
sys.exit(code)
