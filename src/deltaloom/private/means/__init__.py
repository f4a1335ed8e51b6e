"""THE FOLDER IS THE REGISTRY: one file for each way to make a common update of several."""
