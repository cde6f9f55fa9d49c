"""Self-supervised pretraining of XCiT with DINO, and its evaluation."""
