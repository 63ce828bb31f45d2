"""Training with Lightning: modules, data modules, recipes."""
