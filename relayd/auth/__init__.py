"""Tokens, principals, allowed origins and the throttle on failed logins."""
