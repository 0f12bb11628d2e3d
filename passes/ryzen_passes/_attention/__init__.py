"""What the pass `attention` is made of: finding, masking, raising, legalising."""
