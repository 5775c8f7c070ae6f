"""Runs parts of plan.py that measure, in one process; see session.py.

No module of this folder may have the name of a package that others look for, as `kernels` is.
"""

from __future__ import annotations

import session

PARTS = {
    "numerics": "numerics.run",
    "kernels": "kernel_times.run",
    "speed": "speed.run",
    "model": "whole_model.run",
    "speed_more": "speed.run_more",
    "compiled": "compiled.run",
    "graphs": "speed.run_graphs",
}

if __name__ == "__main__":
    session.main(PARTS)
