"""Tasks in this process, in worker processes, and on a Ray cluster.

A task is a command line. The module that runs it is given by name, so nothing here imports a command.
"""
