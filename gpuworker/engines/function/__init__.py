"""The engine that serves any Python function."""
