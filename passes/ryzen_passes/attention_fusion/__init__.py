"""Recognition of decomposed attention and its masks, and fusion into the ONNX op Attention; shared by several passes."""

from __future__ import annotations

from ryzen_passes.attention_fusion.fuse import fuse_attention
from ryzen_passes.attention_fusion.masks import Mask, MaskBuilder, finite_mask_value
from ryzen_passes.attention_fusion.match import MASK_FILL_THRESHOLD, AttentionMatcher

__all__ = ["MASK_FILL_THRESHOLD", "AttentionMatcher", "Mask", "MaskBuilder", "finite_mask_value", "fuse_attention"]
