"""THE FOLDER IS THE REGISTRY: one file per compressor, model -> (smaller model, facts)."""
