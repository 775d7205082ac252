"""The parts of tools/record_teacher.py."""
