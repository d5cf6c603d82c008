"""The messages of relay.v1.msgpack: their fields, their rules, and their encoding."""
