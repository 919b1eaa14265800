"""Boxes, anchors, masks and pooling on tensors; no detector is known here."""
