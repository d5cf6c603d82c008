"""The relay's logging, and the recent log events that operators can watch."""
