"""The client library: requests, streams, inputs and watching."""
