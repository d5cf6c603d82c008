"""The GPU side: a worker that dials out to a relay, registers its spaces and runs requests on its engines."""
