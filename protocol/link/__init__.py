"""A connection: WebSocket framing, liveness, limits, dialling and reconnecting."""
