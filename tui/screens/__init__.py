"""One module for a screen or a dialog."""
