"""Views of a run: page, charts, pictures, lists."""
