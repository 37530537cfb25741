"""Doors for other trainers: their own names and signatures, computed by the head operator, without logits."""
