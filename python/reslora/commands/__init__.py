"""The command line `reslora`, and what its commands do."""
