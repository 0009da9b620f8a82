"""What surrounds an experiment: settings, hospitals, devices, results, tables, the screen."""
