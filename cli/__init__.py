"""The `lorasb` command line: one file per verb."""
