"""Before and after: figures, tables, charts."""
