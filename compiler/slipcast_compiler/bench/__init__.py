"""`slipcast bench`: a bundle against what a user would run instead, on this machine, at what loss.

peers.py says what it can be compared with, plan.py what a run will do, sides/ how each side draws (in a process of its
own: process.py here, worker.py there), measure.py in which order, figures.py and summary.py what follows from it, and
document.py in what form that is kept.
A bundle alone is measured without any library of the compiler.
"""
