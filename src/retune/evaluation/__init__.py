"""How good is a release, and is it better than another: metrics, slices, paired comparison, figures and report.

The arithmetic reads and writes no files. Import the submodules; this package imports none of them, and only `plots` needs matplotlib.
"""
