"""Images in .beton files, and batches of views of them."""
