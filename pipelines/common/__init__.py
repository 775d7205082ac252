"""What all packages stand on: errors for users, complete files, the machine, its launchers, and ranges of settings."""
