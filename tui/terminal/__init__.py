"""Everything between Textual and the terminal: the driver, smaller updates, the bridge to Trio and a safe exit."""
