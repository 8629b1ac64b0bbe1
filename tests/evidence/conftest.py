"""The scripts here measure, for minutes, and are run by `make evidence`; they are no tests."""

collect_ignore_glob = ["*.py"]
