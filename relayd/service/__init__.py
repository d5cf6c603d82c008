"""The relay as a service of the operating system: systemd's watchdog, health checks and the memory allocator."""
