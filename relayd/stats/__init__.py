"""Counters, rates and histograms of what the relay does."""
