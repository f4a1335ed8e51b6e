"""The wire: frames, the schema of their headers, how tensors travel."""
