"""`videomamba plot`: what runs logged, as curves. curves.py reads them, figure.py draws a PNG, page.py an HTML page."""
