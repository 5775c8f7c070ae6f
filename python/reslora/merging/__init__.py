"""Merging adapters away: plans, calibration, refinement, measurements."""
