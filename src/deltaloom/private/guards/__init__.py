"""THE FOLDER IS THE REGISTRY: one file for each guard of what a party sends."""
