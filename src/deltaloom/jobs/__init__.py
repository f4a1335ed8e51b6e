"""One function for each command: what the command line does is here, without a terminal."""
