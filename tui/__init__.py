"""A full-screen terminal program with which an operator watches and steers a relay."""
