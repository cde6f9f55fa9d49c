"""XCiT, as in the paper."""
