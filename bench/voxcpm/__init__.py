"""Compares VoxCPM through the relay with the plain package."""
