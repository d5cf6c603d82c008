"""VoxCPM through the relay, beside the plain package."""
