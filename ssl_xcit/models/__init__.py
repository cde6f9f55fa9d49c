"""The XCiT architecture."""
