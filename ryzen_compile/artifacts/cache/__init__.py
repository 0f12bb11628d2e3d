"""The cache: results of earlier jobs, looked up by a digest of everything that determines them."""
