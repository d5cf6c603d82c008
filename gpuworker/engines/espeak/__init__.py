"""The engine that speaks with espeak-ng, on any CPU."""
