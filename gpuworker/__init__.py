"""The GPU side: a worker connects to a relay, registers its spaces and runs their requests on its engines."""
