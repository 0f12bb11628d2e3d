"""What is written to disk to stay: packages and the build cache."""
