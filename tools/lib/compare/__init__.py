"""The parts of tools/compare.py.

candidates.py knows the models and their accuracies, backends.py the runtimes; measuring.py times them in turn,
ranking.py orders the speeds, results.py makes rows and tables of them, charts.py a picture and a page.
"""
