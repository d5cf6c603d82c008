"""Sockets: the reactor and its links, HTTP heads, the WebSocket handshake and TLS. Independent of requests."""
