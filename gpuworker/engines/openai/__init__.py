"""Engine `openai`: any OpenAI-compatible speech server on the worker's own network."""
