"""The frames of a request, in memory and on disk, and the readers that follow them."""
