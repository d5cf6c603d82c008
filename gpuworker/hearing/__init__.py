"""Hears: cuts what comes of a microphone into utterances, and has an engine recognize each."""
