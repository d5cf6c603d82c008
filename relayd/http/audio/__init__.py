"""Encoders for audio in other formats, rates and speeds; all but `threaded_encoder` know no event loop."""
