"""The messages of relay.v1.msgpack, their fields and rules, and how they become bytes."""
