"""The config tree, as YAML. A package, so that the installed command and Flower's bundle find it."""
