"""What was imaged: folders and CSV files → one index table, a row per field of view; its quality; its splits."""
