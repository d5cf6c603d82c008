"""Encoders of audio, which the relay and the command `relay` share."""
