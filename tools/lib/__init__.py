"""The parts of the commands: lib/NAME has those of tools/NAME.py, lib/common what several commands share."""
