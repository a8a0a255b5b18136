"""Tables and journals → pictures and pages."""
