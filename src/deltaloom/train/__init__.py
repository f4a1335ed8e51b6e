"""Training: one loop, its optimizer, schedule, checkpoints and signals, and a callback for Hugging Face's Trainer."""
