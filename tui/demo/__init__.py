"""The simulated relay that `relay-tui --demo` shows."""
