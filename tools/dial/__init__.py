"""The dial: a page on which a reader turns one feature up and down and watches the model answer.

``measure`` writes what the page needs of a crosscoder into ``data/dial``, ``pack`` makes the page
from that and the pair, ``page/`` holds its HTML, CSS and JavaScript.
"""
