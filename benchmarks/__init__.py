"""What caching costs and what it brings, measured side by side."""
