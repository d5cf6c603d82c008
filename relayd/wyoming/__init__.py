"""The Wyoming protocol, by which Home Assistant speaks, listens and converses."""
