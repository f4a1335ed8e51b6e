"""deltaloom: adapt a frozen pretrained model by training a small delta."""

__version__ = "0.1.0"
