"""The screens and dialogs, one module for each."""
