"""What operators see of the relay's state: rows, the watch feed and the details of one request."""
