"""The commands of `relay`."""
