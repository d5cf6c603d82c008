"""The relay as an operating system service: systemd's watchdog, health checks and the memory allocator."""
