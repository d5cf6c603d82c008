"""The protocols in which clients talk."""
