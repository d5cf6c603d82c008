"""From an accepted socket to a logged-in client, worker or operator, and the handlers of their messages."""
