"""The settings: their schema, and their loading from relayd.toml and the environment."""
