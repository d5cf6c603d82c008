"""HTTP on the relay's port: requests, OpenAI's speech API, operations and the page, on the same queue as the rest."""
