"""Colours, and how a theme is chosen."""
