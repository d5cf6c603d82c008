"""How the relay logs, and the recent log lines that operators can watch."""
