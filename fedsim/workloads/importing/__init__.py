"""Makes bundles of files that people have: a module for each kind, and `writing` for what all of them end with."""
