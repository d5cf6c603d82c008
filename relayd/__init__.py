"""The daemon: queues requests, hands them to workers and streams the results back."""
