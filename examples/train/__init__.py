"""SimCLR with recipes, resuming, several processes and pictures: `python examples/train --help`."""
