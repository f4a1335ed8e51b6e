"""What a person reads of a run: the HTML page, the terminal lines, comparisons, the model card. Never imports torch."""
