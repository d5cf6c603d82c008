"""Counters, rates and histograms of the relay's work."""
