"""What engines in front of a model's server have in common: an HTTP client, options, and words for its refusals."""
