"""Recognition of decoders: attention by structure, masks and positions by probing."""
