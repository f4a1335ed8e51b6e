"""Autograd functions of the hot path."""
