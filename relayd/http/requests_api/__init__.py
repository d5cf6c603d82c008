"""The relay's own HTTP API: submit, follow, download and cancel requests."""
