"""Saved deltas: the native folder, PEFT's files, merged models, conversions, and what can be read without torch."""
