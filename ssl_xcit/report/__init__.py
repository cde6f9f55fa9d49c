"""A run to look at: page, charts, pictures, lists."""
