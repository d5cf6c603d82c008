"""Engine `chat`: replies by a server that speaks OpenAI's chat API."""
