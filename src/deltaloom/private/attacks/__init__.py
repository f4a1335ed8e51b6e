"""THE FOLDER IS THE REGISTRY: one file for each attack by which leakage is measured."""
