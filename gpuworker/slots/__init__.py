"""Slots: room for one running request each, and the engine processes behind them."""
