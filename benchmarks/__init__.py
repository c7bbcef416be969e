"""What the library costs, against its peers, in one process: see ``README.md``."""
