"""Runtime: loads packages on this machine, runs and times them, and generates tokens with decoders."""
