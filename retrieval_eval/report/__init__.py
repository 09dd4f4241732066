"""`report.html`: a page that holds everything it shows and asks the network for nothing.

data.py        what a page shows, as one value       page.py      that value as HTML
evaluation.py  the value of an evaluation's folder   tables.py    the numbers, with their intervals
charts.py, histogram.py, similarity.py               lines, bars, and the matrix of scores as a picture
strips.py, figures.py                                which queries are shown, and frames as small JPEGs
"""
