"""What the screens show, without Textual: rows, columns, cells, filters, order and actions."""
