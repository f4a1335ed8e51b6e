"""The command line: one file per command, which calls one function of `deltaloom.jobs`."""
