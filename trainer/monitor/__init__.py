"""What is recorded about a run while it trains, and the report at its end.

monitor.py is what the loop calls: it averages the metrics between two log lines, names the samples behind a loss that
is not finite, and checks that the teacher knows the dataset's classes. quarantine.py lists damaged samples.
telemetry.py writes metrics.jsonl and the terminal, sinks.py TensorBoard and Weights & Biases. run_files.py has the
types and the checks of these files, report/ makes the page.
"""
