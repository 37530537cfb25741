"""Causal language models of Transformers: loading, the head, the trunk, adapters and the reference policy."""
