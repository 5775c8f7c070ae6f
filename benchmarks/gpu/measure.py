"""Runs parts of plan.py that measure, in one process; see common.py."""

from __future__ import annotations

import common

PARTS = {
    "numerics": "numerics.run",
    "kernels": "kernels.run",
    "speed": "speed.run",
    "model": "model.run",
    "speed_more": "speed.run_more",
    "compiled": "compiled.run",
    "graphs": "speed.run_graphs",
}

if __name__ == "__main__":
    common.main(PARTS)
