"""The study: many students, one recipe, one report. tools/study.py is the command."""
