"""The relay's state and every change to it; uses scheduling, frames and the store, but no connections or HTTP."""
