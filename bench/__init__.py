"""Figures of this machine, as ratios in one run; see README.md in this folder for what each means."""
