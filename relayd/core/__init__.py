"""The relay's state and every change to it; knows scheduling, frames and the store, and no connection or HTTP."""
