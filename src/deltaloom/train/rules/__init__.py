"""THE FOLDER IS THE REGISTRY: one file per rule of a strategy; `base.py` is their contract."""
