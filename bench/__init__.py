"""Measurements of this machine, as ratios within one run; README.md in this folder explains each figure."""
