"""What holds for all tests."""

import signal

# A shell that runs the tests in the background has them, and what they start, ignore Ctrl+C; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
