"""Hidden states and LM head to per-token log-probs, without ever holding the logits."""
