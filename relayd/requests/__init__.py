"""One request: its record, its deadlines and its summary for operators."""
