"""The ranks of a run: who they are, how they find each other, and how they end together.

world.py has World, the ranks and their collectives. rendezvous.py lets the ranks meet and compares what they were
given, such as the code (code_version.py). watchdog.py ends a run in which a rank hangs or is lost, preemption.py stops
all ranks at the same step. memory.py recognises errors about too little memory.
"""
