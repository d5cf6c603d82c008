"""Speaks a text while it is being written: the live input `text` of engines that have a param of that name."""
