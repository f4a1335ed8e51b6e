"""Private tuning: the front of a model at the party, the back at the owner."""
