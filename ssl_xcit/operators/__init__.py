"""What is computed in more than one way, each with its plain definition."""
