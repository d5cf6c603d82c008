"""HTTP on the relay's port: the request API, OpenAI's speech API, health, metrics and the page."""
