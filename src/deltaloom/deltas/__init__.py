"""Delta methods: this folder is the registry. One file per method, named as the method (with _ for -).

Nothing is imported here: `method_class("lora")` imports one file, `catalogue()` reads the files as text, so that the list
of methods needs neither torch nor a method file without faults.
"""
