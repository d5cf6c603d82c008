"""Audio encoders for other formats, sample rates and speeds; only `threaded_encoder` uses the event loop."""
