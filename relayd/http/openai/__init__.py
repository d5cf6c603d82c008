"""OpenAI's speech API over the relay's requests."""
