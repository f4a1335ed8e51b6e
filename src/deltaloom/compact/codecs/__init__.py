"""One file per codec; the folder is the registry."""
