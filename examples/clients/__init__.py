"""The library inside other frameworks, one short file for each."""
