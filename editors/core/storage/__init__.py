"""Edits outside the process: folders, journals, merges, the Hub, LoRA adapters, merged models."""
