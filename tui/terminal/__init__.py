"""Between Textual and the terminal: the driver, its updates, the bridge to Trio and a clean exit."""
