"""What runs the stages: rows in, rows out, results kept by content."""
