"""The tests, in the package's folders; `system/` holds whole runs."""
