"""All that is shown: progress, tables, pages, JSON."""
