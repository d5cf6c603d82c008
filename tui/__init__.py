"""The operator's view of a relay."""
