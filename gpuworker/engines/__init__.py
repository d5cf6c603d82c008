"""Engines: what a slot runs. `base` says what one is, `catalog` finds them, each other module is one."""
