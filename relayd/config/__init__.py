"""The settings: their schema, and how they are read from relayd.toml and the environment."""
