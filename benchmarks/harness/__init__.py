"""One way to measure, keep and report, for every subject and device."""
