"""Searching hyper-parameters, methods and their combinations; the only home of Optuna, which is imported when a search begins."""
