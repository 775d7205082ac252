"""What several commands share.

Here are the terminal, tables and units; timing and the hardware it was done on; photographs for tests and benchmarks;
arguments of command lines; a pool of processes; and ONNX files with the attention that they can hold.
"""
