"""Conversations: what is said is answered in one space and spoken in another."""
