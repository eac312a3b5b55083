"""Reports for people: one self-contained HTML page, plots inside."""
