"""Who runs what, and when: a pure state machine that knows no I/O, no clock and no event loop."""
