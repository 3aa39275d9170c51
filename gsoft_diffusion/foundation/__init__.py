"""What everything stands on: errors, files, free memory, the hub, names of base models."""
