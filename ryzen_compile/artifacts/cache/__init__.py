"""The cache: what was built before, found again by everything that decides what is built."""
