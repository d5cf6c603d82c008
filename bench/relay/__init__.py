"""The relay under load, beside other relays."""
