"""The report on one run or several: page.py makes the HTML page from the runs' folders, charts.py its pictures."""
