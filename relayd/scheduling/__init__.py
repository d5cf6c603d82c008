"""Decides which request runs when and on which worker: a pure state machine without I/O, clock and event loop."""
