"""A campaign of faults against the commands: kills, failing disks, damaged files, bad input. `make faults` runs all of it."""
