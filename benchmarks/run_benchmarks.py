"""Serving in every mode: the same as ``cachegen bench``, with its options.

python benchmarks/run_benchmarks.py --bandwidth 100Mbps --json out.json --plot out.png
"""

from __future__ import annotations

import sys

from cachegen.cli.main import app

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    app()
