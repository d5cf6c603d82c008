"""Colour themes, and how one is chosen."""
