"""The script here compiles for a GPU, for minutes, run by `make verify-gpu`; it is no test."""

collect_ignore_glob = ["*.py"]
